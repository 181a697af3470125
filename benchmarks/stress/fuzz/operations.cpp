// The fuzz target: the bytes say which operation, of what sizes, with which options and values; the result is compared
// with a plain loop in long double, to within the bound that the loop itself gives (bounded.h).
#include <memory>
#include <vector>

#include "head.h"

namespace fuzz {
namespace {

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

/// P after it has absorbed h̄, and what that makes of a row G of the gradient.
class Absorbed {
 public:
  Absorbed(const Array& P, const Array& h, int64_t s, const Hyperparameters& options)
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

  /// G P_t as G P − (G u) uᵀ. To make P_t first, as the CPU does, is within its bound, given that its elements round to
  /// multiples of the smallest number.
  Bounded project(const std::vector<Bounded>& G, Bounded along_u, int64_t j) const {
    const auto row = [&](int64_t i) { return G[size_t(i)]; };
    const Bounded z = dot(s_, row, [&](int64_t i) { return Bounded{before(i, j).value, precision.tiny}; });
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

}  // namespace

void try_feature_mean(Input& input) {
  const DType dtype = any_dtype(input), accumulate = accumulate_type(dtype);
  const int64_t N = input.size(2 * largest_size), s = input.size(largest_size);
  const int64_t stride = s + (takes_strides ? input.below(3) : 0);
  precision = format_of(accumulate).precision();
  described = "feature_mean " + words("N", N, "s", s, "dtype", int(dtype));
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
  Hyperparameters hyper;
  hyper.alpha = input.number({0.1, 1e-6, 1e6});
  hyper.forget = input.number({0, 1e-3, 1});
  hyper.normalize = input.flag();
  described = "rls_update " + words("s", s, "dtype", int(dtype), "alpha", hyper.alpha, "forget", hyper.forget,
                                    "normalize", hyper.normalize);
  Array P = projection(input, dtype, s), h = numbers(input, dtype, s);
  const Array before = P, mean = h;
  rls_update(dtype, P.data(), h.data(), s, hyper);
  check_same_bits("feature_mean", h, mean);
  check_projection(P, before, Absorbed(before, mean, s, hyper), s, dtype);
}

void try_head_step(Input& input) {
  Head head(input, largest_size, no_classes);
  const int64_t C = head.C, s = head.s;
  const DType accumulate = head.accumulate;
  Array P = projection(input, accumulate, s), given;
  const bool absorbs = head.absorbs, by_new = absorbs && head.hyper.absorb_before;
  const bool is_given = input.below(4) == 0 && C > 0 && (takes_any_product || !by_new);
  if (is_given) {
    given = Array(accumulate, C * s);
    for (int64_t i = 0; i < C * s; ++i) {
      long double z = 0;
      for (int64_t j = 0; j < s; ++j) z += head.grad.get(i / s * s + j) * P.get(j * s + i % s);
      given.set(i, z);
    }
  }
  described = "head_step " + words("given", is_given) + head.words();
  const Head before = head;
  const Array old_P = P;
  head_step(head.step({P.data(), nullptr, nullptr, nullptr, 0}), given.data());

  if (!head.check_unchanged(before)) return check_same_bits("P after an overflow", P, old_P);
  Array nothing(accumulate, s);
  if (!absorbs) check_same_bits("P, with nothing to absorb", P, old_P);
  const Absorbed absorbed(old_P, absorbs ? before.feature_mean : nothing, s, head.hyper);
  if (absorbs) check_projection(P, old_P, absorbed, s, accumulate);

  for (int64_t c = 0; c < C; ++c) {
    std::vector<Bounded> G(static_cast<size_t>(s));
    for (int64_t i = 0; i < s; ++i) G[size_t(i)] = {before.grad.get(c * s + i), 0};
    const Bounded along_u = by_new ? absorbed.along_u(G) : Bounded{};
    head.check_row(before, c, [&](int64_t j) {
      if (by_new && absorbed.is_known() && absorbed.happens()) return absorbed.project(G, along_u, j);
      Bounded z = dot(s, [&](int64_t i) { return G[size_t(i)]; }, [&](int64_t i) { return absorbed.before(i, j); });
      if (by_new && !absorbed.is_known()) z.error = INFINITY;
      return z;
    });
  }
}

namespace {

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

}  // namespace

void try_entropy_fusion(Input& input) {
  const DType dtype = any_dtype(input), accumulate = accumulate_type(dtype);
  const int64_t M = input.size(6), N = input.size(40) - 1, C = input.size(2 * largest_size);
  precision = format_of(accumulate).precision();
  described = "entropy_fusion " + words("M", M, "N", N, "C", C, "dtype", int(dtype));
  Array logits = numbers(input, dtype, M * N * C), fused(dtype, N * C, input.below(4)), weights(accumulate, M * N);
  const bool all = input.flag();
  std::mt19937 generator(input.byte());
  const auto present = std::make_unique<bool[]>(size_t(M * N));
  for (int64_t i = 0; i < M * N; ++i) present[size_t(i)] = all || generator() % 3;
  const bool equal = input.flag();
  Array temperatures(accumulate, input.flag() ? M : -1), f(accumulate, M * N * C);  // f: logits / T
  for (int64_t m = 0; m < temperatures.count(); ++m) temperatures.set(m, std::ldexp(1.0L, int(input.below(5)) - 2));
  for (int64_t i = 0; i < M * N * C; ++i) {  // powers of two round nothing
    f.set(i, logits.get(i) / (temperatures.is_present() ? temperatures.get(i / (N * C)) : 1));
  }
  const Array before = logits;
  entropy_fusion(dtype, {logits.data(), all ? nullptr : present.get(), fused.data(), weights.data(), M, N, C,
                         temperatures.data(), equal});
  check_same_bits("logits", logits, before);

  for (int64_t n = 0; n < N; ++n) {
    std::vector<Entropy> entropies(static_cast<size_t>(M), {INFINITY, 0});
    long double lowest = INFINITY, error = 0;
    bool finite = true;
    for (int64_t m = 0; m < M; ++m) {
      if (!present[size_t(m * N + n)]) continue;
      std::vector<long double> x(static_cast<size_t>(C));
      for (int64_t c = 0; c < C; ++c) x[size_t(c)] = f.get((m * N + n) * C + c);
      entropies[size_t(m)] = equal ? Entropy{0, 0} : entropy(x);
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
        return Bounded{present[size_t(m * N + n)] ? f.get((m * N + n) * C + c) : 0, 0};
      };
      check("fused", fused, n * C + c, dot(M, [&](int64_t m) { return lambda[size_t(m)]; }, logit), dtype);
    }
  }
}

}  // namespace fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::Input input(data, size);
  ++fuzz::tally.inputs;
  fuzz::use(input.below(unsigned(fuzz::variants)), input.byte());
  fuzz::targets[size_t(input.below(unsigned(fuzz::targets.size())))](input);
  return 0;
}
