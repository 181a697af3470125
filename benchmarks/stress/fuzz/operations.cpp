// The fuzz target: the bytes say which operation, of what sizes, with which options and values; the result is compared
// with a plain loop in long double, to within the bound that the loop itself gives (bounded.h).
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "backend.h"
#include "bounded.h"
#include "input.h"

namespace fuzz {
namespace {

/// Says at the end of the program what has been compared.
struct Tally {
  long long inputs = 0, compared = 0, unknown = 0;

  ~Tally() {
    std::printf("%lld inputs, %lld numbers compared, %lld left open by overflow or cancellation\n", inputs, compared,
                unknown);
  }
} tally;

std::string described;  // this input

[[noreturn]] void fail(const char* what, int64_t index, long double got, Bounded expected) {
  std::fprintf(stderr, "%s[%lld]: got %.9Lg, expected %.9Lg within %.3Lg\n%s\n", what, (long long)index, got,
               expected.value, expected.error, described.c_str());
  std::abort();
}

void check(const char* what, const Array& array, int64_t i, Bounded expected, DType dtype) {
  const Precision storage = format_of(dtype).precision();
  const long double got = array.get(i), magnitude = std::fabs(expected.value);
  if (!expected.is_known()) {
    ++tally.unknown;
    return;
  }
  ++tally.compared;
  const bool finite = std::isfinite(got);
  const long double bound = expected.error + storage.epsilon * magnitude + storage.tiny;
  const bool may_overflow = !(magnitude + bound <= storage.largest);
  const bool right = !std::isfinite(expected.value) ? !finite
                     : finite                       ? std::fabs(got - expected.value) <= bound
                                                    : may_overflow;
  if (!right) fail(what, i, got, {expected.value, bound});
}

void check_same_bits(const char* what, const Array& now, const Array& before) {
  if (now.has_same_bits(before)) return;
  std::fprintf(stderr, "%s: changed, and should not have\n%s\n", what, described.c_str());
  std::abort();
}

DType any_dtype(Input& input) { return DType(input.below(4)); }

Array numbers(Input& input, DType dtype, int64_t count) {
  Array array(dtype, count, input.below(4));
  Numbers(input).fill(array, dtype);
  return array;
}

/// Symmetric: the identity, or positive semidefinite (I − u uᵀ), or of any numbers.
Array projection(Input& input, DType dtype, int64_t s) {
  Array P(dtype, s * s, input.below(4));
  Numbers drawn(input);
  const int64_t kind = input.below(3);
  std::vector<long double> u(static_cast<size_t>(s));
  long double norm = 0;
  for (long double& x : u) {
    x = drawn.next(dtype);
    norm += x * x;
  }
  const long double factor = std::isfinite(norm) && norm > 0 ? 1 / norm : 0;
  for (int64_t i = 0; i < s; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      const long double one = i == j, product = factor == 0 ? 0 : u[size_t(i)] * u[size_t(j)] * factor;
      const long double x = kind == 0 ? one : kind == 1 ? one - product : drawn.next(dtype);
      P.set(i * s + j, x);
      P.set(j * s + i, x);
    }
  }
  return P;
}

void check_symmetric(const Array& P, int64_t s) {
  for (int64_t i = 0; i < s; ++i) {
    for (int64_t j = 0; j < i; ++j) {
      const long double a = P.get(i * s + j), b = P.get(j * s + i);
      if (a != b && !(std::isnan(a) && std::isnan(b))) fail("P, not symmetric", i * s + j, a, {b, 0});
    }
  }
}

/// A step's hyperparameters, as numbers of the accumulate type.
struct Absorption {
  double alpha, forget;
  bool normalize;
};

/// P after it has absorbed h̄, and what that makes of a row G of the gradient.
class Absorbed {
 public:
  Absorbed(const Array& P, const Array& h, int64_t s, const Absorption& options)
      : P_(P),
        s_(s),
        k_(size_t(s)),
        u_(size_t(s)),
        keep_(constant(1) - constant(options.forget)),
        forget_(constant(options.forget)) {
    const auto mean = [&](int64_t i) { return Bounded{h.get(i), 0}; };
    for (int64_t i = 0; i < s; ++i) k_[size_t(i)] = dot(s, [&](int64_t j) { return before(i, j); }, mean);
    const Bounded d = constant(options.alpha) + dot(s, mean, [&](int64_t i) { return k_[size_t(i)]; });
    is_known_ = d.is_known() && (!std::isfinite(d.value) || std::fabs(d.value) > d.error);
    happens_ = std::isfinite(d.value);
    if (!happens_ || !is_known_) return;
    sign_ = d.value > 0 ? 1 : -1;
    root_ = sqrt(Bounded{std::fabs(d.value), d.error});
    for (int64_t i = 0; i < s; ++i) u_[size_t(i)] = k_[size_t(i)] / root_;
    if (!options.normalize) return;
    Bounded total;
    for (int64_t i = 0; i < s; ++i) {
      const auto row = [&](int64_t j) { return after(i, j); };
      total = total + dot(s, row, row);
    }
    norm_ = sqrt(total);
    normalizes_ = true;
  }

  bool is_known() const { return is_known_; }  // whether d is sure to be usable, or sure not to be
  bool happens() const { return happens_; }

  Bounded after(int64_t i, int64_t j) const {
    Bounded p = keep_ * (before(i, j) - sign() * (u_[size_t(i)] * u_[size_t(j)]));
    if (i == j) p = p + forget_;
    return normalizes_ ? p / norm_ : p;
  }

  /// G P_t as G P − (G u) uᵀ: to make P_t first, as the CPU does, is within its bound.
  Bounded project(const std::vector<Bounded>& G, Bounded along_u, int64_t j) const {
    const auto row = [&](int64_t i) { return G[size_t(i)]; };
    const Bounded z = dot(s_, row, [&](int64_t i) { return before(i, j); });
    const Bounded kept = keep_ * (z - sign() * (along_u * u_[size_t(j)])) + forget_ * row(j);
    return normalizes_ ? kept / norm_ : kept;
  }
  Bounded along_u(const std::vector<Bounded>& G) const {
    return dot(s_, [&](int64_t i) { return G[size_t(i)]; }, [&](int64_t i) { return k_[size_t(i)]; }) / root_;
  }
  Bounded before(int64_t i, int64_t j) const { return {P_.get(i * s_ + j), 0}; }

 private:
  Bounded sign() const { return {sign_, 0}; }

  const Array& P_;
  int64_t s_;
  std::vector<Bounded> k_, u_;
  Bounded keep_, forget_, root_, norm_;
  long double sign_ = 1;
  bool is_known_ = false, happens_ = false, normalizes_ = false;
};

void check_projection(const Array& now, const Array& before, const Absorbed& absorbed, int64_t s, DType accumulate) {
  check_symmetric(now, s);
  if (!absorbed.is_known()) {
    tally.unknown += s * s;
  } else if (!absorbed.happens()) {
    check_same_bits("P, with nothing to absorb", now, before);
  } else {
    for (int64_t i = 0; i < s; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        check("P", now, i * s + j, absorbed.after(i, j), accumulate);
      }
    }
  }
}

void try_feature_mean(Input& input) {
  const DType dtype = any_dtype(input), accumulate = accumulate_type(dtype);
  const int64_t N = input.size(2 * largest_size), s = input.size(largest_size);
  const int64_t stride = s + (takes_scalars_from_memory ? input.below(3) : 0);
  precision = format_of(accumulate).precision();
  described =
      "feature_mean N " + std::to_string(N) + " s " + std::to_string(s) + " dtype " + std::to_string(int(dtype));
  // The last row ends with the last element: nothing beyond it may be read.
  Array features = numbers(input, dtype, (N - 1) * stride + s), mean(accumulate, s, input.below(4));
  const Array before = features;
  feature_mean(dtype, features.data(), mean.data(), N, s, stride);
  check_same_bits("features", features, before);
  for (int64_t j = 0; j < s; ++j) {
    const Bounded sum = dot(
        N, [&](int64_t i) { return Bounded{features.get(i * stride + j), 0}; }, [](int64_t) { return Bounded{1, 0}; });
    check("mean", mean, j, sum / Bounded{static_cast<long double>(N), 0}, accumulate);
  }
}

void try_rls_update(Input& input) {
  const DType dtype = input.flag() ? DType::Float64 : DType::Float32;
  const int64_t s = input.size(largest_size);
  precision = format_of(dtype).precision();
  const Absorption options = {input.number({0.1, 1e-6, 1e6}), input.number({0, 1e-3, 1}), input.flag()};
  described = "rls_update s " + std::to_string(s) + " dtype " + std::to_string(int(dtype)) + " alpha " +
              std::to_string(options.alpha) + " forget " + std::to_string(options.forget) + " normalize " +
              std::to_string(options.normalize);
  Array P = projection(input, dtype, s), h = numbers(input, dtype, s);
  const Array before = P, mean = h;
  rls_update(dtype, {P.data(), h.data(), s, options.alpha, options.forget, options.normalize});
  check_same_bits("feature_mean", h, mean);
  check_projection(P, before, Absorbed(before, mean, s, options), s, dtype);
}

void try_head_step(Input& input) {
  const DType dtype = any_dtype(input), accumulate = accumulate_type(dtype);
  const int64_t s = input.size(largest_size), C = input.size(largest_size / 3) - 1 + (no_classes > 0);
  precision = format_of(accumulate).precision();
  const bool absorbs = input.below(8) != 0, has_momentum = input.flag(), is_first = input.flag();
  HeadStep step = {};
  step.rls.s = s;
  step.C = C;
  step.rls.alpha = input.number({0.1, 1e-6, 1e6});
  step.rls.forget = input.number({0, 1e-3, 1});
  step.rls.normalize = input.flag();
  step.absorb_before = input.flag();
  step.nesterov = input.flag();
  step.maximize = input.flag();
  step.lr = input.number({0.1, 0, 1e3});
  step.momentum = has_momentum ? input.number({0.9, 0.5, 1}) : 0;
  step.dampening = input.number({0, 0.3, 1});
  step.weight_decay = input.number({0, 0.01, 1});
  step.grad_scale = static_cast<float>(input.number({1, 1024, 65536}));
  if (step.grad_scale == 0) step.grad_scale = 1;
  step.scalars_from_memory = takes_scalars_from_memory && input.flag();
  step.found_inf = step.scalars_from_memory && input.below(4) == 0;
  if (step.scalars_from_memory) {
    step.lr = static_cast<float>(step.lr);
    step.rls.alpha = static_cast<float>(step.rls.alpha);
  }
  Array weight = numbers(input, dtype, C * s), grad = numbers(input, dtype, C * s);
  Array buffer = has_momentum ? numbers(input, accumulate, C * s) : Array();
  if (has_momentum && is_first) buffer = Array(accumulate, C * s);  // uninitialised
  Array P = projection(input, accumulate, s), h = absorbs ? numbers(input, accumulate, s) : Array();
  float steps = is_first ? 0 : 3;
  Array given;
  const bool is_given = input.below(4) == 0 && C > 0 && (takes_scalars_from_memory || !step.absorb_before || !absorbs);
  if (is_given) {
    given = Array(accumulate, C * s);
    for (int64_t i = 0; i < C * s; ++i) {
      long double z = 0;
      for (int64_t j = 0; j < s; ++j) z += grad.get(i / s * s + j) * P.get(j * s + i % s);
      given.set(i, z);
    }
  }
  described = "head_step C " + std::to_string(C) + " s " + std::to_string(s) + " dtype " + std::to_string(int(dtype)) +
              " absorbs " + std::to_string(absorbs) + " before " + std::to_string(step.absorb_before) + " given " +
              std::to_string(is_given) + " first " + std::to_string(is_first) + " normalize " +
              std::to_string(step.rls.normalize) + " found_inf " + std::to_string(step.found_inf) + " alpha " +
              std::to_string(step.rls.alpha) + " forget " + std::to_string(step.rls.forget) + " lr " +
              std::to_string(step.lr) + " momentum " + std::to_string(step.momentum);
  const Array old_weight = weight, old_grad = grad, old_buffer = buffer, old_P = P, old_h = h;
  step.rls.projection = P.data();
  step.rls.feature_mean = h.data();
  step.weight = weight.data();
  step.grad = grad.data();
  step.momentum_buffer = buffer.data();
  step.projected_grad = given.data();
  step.step = &steps;
  head_step(dtype, step);

  check_same_bits("grad", grad, old_grad);
  check_same_bits("feature_mean", h, old_h);
  if (steps != (is_first ? 0 : 3) + (step.found_inf ? 0 : 1)) fail("step", 0, steps, {});
  if (step.found_inf) {
    check_same_bits("weight after an overflow", weight, old_weight);
    check_same_bits("momentum_buffer after an overflow", buffer, old_buffer);
    check_same_bits("P after an overflow", P, old_P);
    return;
  }
  Array nothing(accumulate, s);
  if (!absorbs) check_same_bits("P, with nothing to absorb", P, old_P);
  const Absorbed absorbed(old_P, absorbs ? old_h : nothing, s, {step.rls.alpha, step.rls.forget, step.rls.normalize});
  if (absorbs) check_projection(P, old_P, absorbed, s, accumulate);

  const bool by_new = absorbs && step.absorb_before;
  const Bounded lr = constant(step.lr), momentum = constant(step.momentum), decay = constant(step.weight_decay);
  const Bounded undamped = constant(1 - step.dampening), scale{step.grad_scale, 0};
  for (int64_t c = 0; c < C; ++c) {
    std::vector<Bounded> G(static_cast<size_t>(s));
    for (int64_t i = 0; i < s; ++i) G[size_t(i)] = {old_grad.get(c * s + i), 0};
    const Bounded along_u = by_new ? absorbed.along_u(G) : Bounded{};
    for (int64_t j = 0; j < s; ++j) {
      const int64_t at = c * s + j;
      Bounded z =
          by_new && absorbed.is_known() && absorbed.happens()
              ? absorbed.project(G, along_u, j)
              : dot(s, [&](int64_t i) { return G[size_t(i)]; }, [&](int64_t i) { return absorbed.before(i, j); });
      if (by_new && !absorbed.is_known()) z.error = INFINITY;
      z = z / scale;
      if (step.maximize) z = -z;
      const Bounded w{old_weight.get(at), 0}, g = z + decay * w;
      Bounded v = g;
      if (has_momentum) {
        const Bounded old{is_first ? 0 : old_buffer.get(at), 0};
        const Bounded b = is_first ? g : momentum * old + undamped * g;
        check("momentum_buffer", buffer, at, b, accumulate);
        v = step.nesterov ? g + momentum * b : b;
      }
      check("weight", weight, at, w - lr * v, dtype);
    }
  }
}

struct Entropy {
  long double value, error;
};

/// Of softmax(x), and how far the online and the two-pass algorithm may be from it.
Entropy entropy(const std::vector<long double>& x) {
  long double largest = -INFINITY, total = 0, first = 0, second = 0;
  for (const long double v : x) largest = std::isnan(v) ? v : v > largest ? v : largest;
  for (const long double v : x) {
    const long double y = v - largest, e = std::exp(y);
    total += e;
    if (!(y < -11000)) {  // e underflows to 0, and y may be infinite
      first += y * e;
      second += y * y * e;
    }
  }
  const long double value = std::log(total) - first / total;
  const long double terms = 1 + std::log(total) + (std::fabs(first) + second) / total;
  return {value, (4 * static_cast<long double>(x.size()) + 32) * precision.epsilon * terms + 1e-30L};
}

void try_entropy_fusion(Input& input) {
  const DType dtype = any_dtype(input), accumulate = accumulate_type(dtype);
  const int64_t M = input.size(6), N = input.size(40) - 1, C = input.size(2 * largest_size);
  precision = format_of(accumulate).precision();
  described = "entropy_fusion M " + std::to_string(M) + " N " + std::to_string(N) + " C " + std::to_string(C) +
              " dtype " + std::to_string(int(dtype));
  Array logits = numbers(input, dtype, M * N * C), fused(dtype, N * C, input.below(4)), weights(accumulate, M * N);
  const bool all = input.flag();
  std::mt19937 generator(input.byte());
  const auto present = std::make_unique<bool[]>(size_t(M * N));
  for (int64_t i = 0; i < M * N; ++i) present[size_t(i)] = all || generator() % 3;
  const Array before = logits;
  entropy_fusion(dtype, {logits.data(), all ? nullptr : present.get(), fused.data(), weights.data(), M, N, C});
  check_same_bits("logits", logits, before);

  for (int64_t n = 0; n < N; ++n) {
    std::vector<Entropy> entropies(static_cast<size_t>(M), {INFINITY, 0});
    long double lowest = INFINITY, error = 0;
    bool finite = true;
    for (int64_t m = 0; m < M; ++m) {
      if (!present[size_t(m * N + n)]) continue;
      std::vector<long double> x(static_cast<size_t>(C));
      for (int64_t c = 0; c < C; ++c) x[size_t(c)] = logits.get((m * N + n) * C + c);
      entropies[size_t(m)] = entropy(x);
      finite = finite && std::isfinite(entropies[size_t(m)].value);
      lowest = std::min(lowest, entropies[size_t(m)].value);
      error = std::max(error, entropies[size_t(m)].error);
    }
    long double total = 0;
    for (const Entropy& e : entropies) total += std::isfinite(e.value) ? std::exp(lowest - e.value) : 0;
    const long double relative = std::expm1(2 * error) + (static_cast<long double>(M) + 8) * precision.epsilon;
    std::vector<Bounded> lambda(static_cast<size_t>(M));
    for (int64_t m = 0; m < M; ++m) {
      const bool here = present[size_t(m * N + n)];
      const long double value = !here ? 0 : finite ? std::exp(lowest - entropies[size_t(m)].value) / total : NAN;
      lambda[size_t(m)] = {value, here && finite ? value * relative + precision.tiny : 0};
      check("weights", weights, m * N + n, lambda[size_t(m)], accumulate);
    }
    for (int64_t c = 0; c < C; ++c) {
      const auto logit = [&](int64_t m) {
        return Bounded{present[size_t(m * N + n)] ? logits.get((m * N + n) * C + c) : 0, 0};
      };
      check("fused", fused, n * C + c, dot(M, [&](int64_t m) { return lambda[size_t(m)]; }, logit), dtype);
    }
  }
}

}  // namespace

}  // namespace fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::Input input(data, size);
  ++fuzz::tally.inputs;
  fuzz::use(input.below(unsigned(fuzz::variants)), input.byte());
  switch (input.below(4)) {
    case 0:
      fuzz::try_feature_mean(input);
      break;
    case 1:
      fuzz::try_rls_update(input);
      break;
    case 2:
      fuzz::try_entropy_fusion(input);
      break;
    default:
      fuzz::try_head_step(input);
  }
  return 0;
}
