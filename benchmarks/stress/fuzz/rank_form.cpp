// The rank form P = beta I - K^T K: a step against plain loops, and a compression against another eigensolver.
#include <algorithm>
#include <vector>

#include "cpu.h"
#include "head.h"
#include "symmetric.h"

namespace fuzz {
namespace {

constexpr int64_t kLargestSize = 700, kMostRows = 70;

struct RankForm {
  DType dtype;
  int64_t s, capacity, count;
  bool is_projection;                 // 0 <= P <= beta I, but for rounding
  Array beta, rows;                   // of the rows, `count` are in use: what the others hold is nobody's business
  std::vector<long double> absorbed;  // the direction of the last row, where that was made of one

  RankForm(Input& input, DType dtype, int64_t s, int64_t capacity, int64_t count)
      : dtype(dtype),
        s(s),
        capacity(capacity),
        count(count),
        is_projection(input.below(4) != 0),
        beta(dtype, 1, input.below(4)),
        rows(dtype, capacity * s, input.below(4)) {
    beta.set(0, input.number({1, 0.3, 1e-20, 1}));
    Numbers drawn(input);
    std::mt19937 generator(input.byte());
    const long double strengths[] = {1, 0.999L, 0.5L, 1e-6L};
    for (int64_t i = 0; i < count; ++i) {
      std::vector<long double> h(static_cast<size_t>(s));
      for (long double& x : h) x = drawn.next(dtype);
      if (is_projection) absorb(i, h, strengths[generator() % 4]);
      for (int64_t j = 0; j < s; ++j) rows.set(i * s + j, h[size_t(j)]);
    }
  }

  Bounded row(int64_t i, int64_t j) const { return {rows.get(i * s + j), 0}; }
  Bounded of_identity() const { return {beta.get(0), 0}; }

  /// Column j of x P, where x(j) is x and t(i) its product with row i.
  template <class F, class G>
  Bounded project(const F& x, const G& t, int64_t j) const {
    return dot(
        count + 1, [&](int64_t i) { return i < count ? -t(i) : of_identity(); },
        [&](int64_t i) { return i < count ? row(i, j) : x(j); });
  }
  template <class F>
  std::vector<Bounded> along_rows(const F& x) const {
    std::vector<Bounded> t;
    for (int64_t i = 0; i < count; ++i) t.push_back(dot(s, x, [&](int64_t j) { return row(i, j); }));
    return t;
  }

  /// K K^T of the rows in use.
  Matrix gram() const {
    Matrix G(size_t(count * count));
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t m = 0; m <= i; ++m) {
        long double total = 0;
        for (int64_t j = 0; j < s; ++j) total += rows.get(i * s + j) * rows.get(m * s + j);
        G[size_t(i * count + m)] = G[size_t(m * count + i)] = total;
      }
    }
    return G;
  }

  bool is_finite() const {
    bool finite = std::isfinite(beta.get(0));
    for (int64_t i = 0; i < count * s; ++i) finite = finite && std::isfinite(rows.get(i));
    return finite;
  }

  mla_ext::Projection pointers() { return {nullptr, beta.data(), rows.data(), &count, capacity}; }

  /// The same with room for another number of rows.
  RankForm with_capacity(int64_t other) const {
    RankForm copy = *this;
    copy.capacity = other;
    copy.rows = Array(dtype, other * s, 0);
    for (int64_t i = 0; i < count * s; ++i) copy.rows.set(i, rows.get(i));
    return copy;
  }

 private:
  /// h becomes the row by which P loses this part of what it is along h.
  void absorb(int64_t i, std::vector<long double>& h, long double strength) {
    long double squares = 0, along = 0;
    for (const long double x : h) squares += x * x;
    if (!std::isfinite(squares) || squares == 0) return std::fill(h.begin(), h.end(), 0);
    for (long double& x : h) x /= std::sqrt(squares);
    absorbed = h;
    std::vector<long double> k(h);
    for (long double& x : k) x *= beta.get(0);
    for (int64_t m = 0; m < i; ++m) {
      long double t = 0;
      for (int64_t j = 0; j < s; ++j) t += h[size_t(j)] * rows.get(m * s + j);
      for (int64_t j = 0; j < s; ++j) k[size_t(j)] -= t * rows.get(m * s + j);
    }
    for (int64_t j = 0; j < s; ++j) along += h[size_t(j)] * k[size_t(j)];
    const bool is_left = along > 1e-3L * beta.get(0);
    for (int64_t j = 0; j < s; ++j) h[size_t(j)] = is_left ? k[size_t(j)] * std::sqrt(strength / along) : 0;
  }
};

/// The compression of `full` to half of its capacity.
void check_compressed(const RankForm& full, const RankForm& now) {
  const int64_t R = full.count, s = full.s, keep = full.capacity / 2;
  if (now.count != keep) fail("count after a compression", 0, now.count, {static_cast<long double>(keep), 0});
  if (!full.is_finite()) {
    if (now.is_finite()) fail("P, finite after a compression of what is not", 0, now.beta.get(0), {});
    return;
  }
  if (!full.is_projection) return;
  const Precision p = format_of(full.dtype).precision();
  const long double beta = full.beta.get(0), unit = 8 * static_cast<long double>(R + 4) * p.epsilon * beta + s * p.tiny;
  const Symmetric exact(full.gram(), R);
  const long double least = 64 * p.epsilon * beta;  // what is smaller is rounding
  const auto eigenvalue = [&](int64_t i) { return std::max(beta - exact.values[size_t(i)], least); };
  long double rest = beta;
  for (int64_t i = keep; i < R; ++i) rest += (eigenvalue(i) - beta) / static_cast<long double>(s - keep);
  if (s <= keep) rest = beta;
  rest = std::max(rest, 0.0L);
  check_at_most("beta after a compression", 0, std::fabs(now.beta.get(0) - rest), unit);

  const Matrix gram = now.gram();
  for (int64_t i = 0; i < keep; ++i) {
    for (int64_t m = 0; m < keep; ++m) {
      const long double expected = i == m ? std::max(rest - eigenvalue(i), 0.0L) : 0;
      check_at_most("K K^T after a compression", i * keep + m, std::fabs(gram[size_t(i * keep + m)] - expected), unit);
    }
    // The direction of each row is P's own: P u is its eigenvalue times u, which rounding may have made negative.
    const auto u = [&](int64_t j) { return now.rows.get(i * s + j); };
    Matrix t(static_cast<size_t>(R));
    for (int64_t m = 0; m < R; ++m) {
      for (int64_t j = 0; j < s; ++j) t[size_t(m)] += u(j) * full.rows.get(m * s + j);
    }
    long double squares = 0, length = 0;
    for (int64_t j = 0; j < s; ++j) {
      long double left = exact.values[size_t(i)] * u(j);
      for (int64_t m = 0; m < R; ++m) left -= t[size_t(m)] * full.rows.get(m * s + j);
      squares += left * left;
      length += u(j) * u(j);
    }
    check_at_most("P u after a compression", i, std::sqrt(squares * length), unit * beta);
  }
}

/// 0 <= P <= beta I, but for rounding.
void check_range(const RankForm& now) {
  if (now.count == 0) return;
  const long double strongest = Symmetric(now.gram(), now.count).values[0];
  const Precision p = format_of(now.dtype).precision();
  check_at_most("strongest direction of K", 0, strongest, now.beta.get(0) * (1 + 256 * p.epsilon) + p.tiny);
}

/// P after it has absorbed the mean: one row more, or none, and forgetting.
void check_absorbed(const Head& head, const RankForm& before, const RankForm& now) {
  const int64_t s = head.s, count = before.count;
  const auto h = [&](int64_t j) { return Bounded{head.feature_mean.get(j), 0}; };
  const std::vector<Bounded> t = before.along_rows(h);
  std::vector<Bounded> k;
  for (int64_t j = 0; j < s; ++j) k.push_back(before.project(h, [&](int64_t i) { return t[size_t(i)]; }, j));
  const auto at = [&](int64_t j) { return k[size_t(j)]; };
  const Bounded along = dot(s, h, at), beta = before.of_identity();
  const Bounded least = beta.value > 0 ? dot(s, at, at) / beta : Bounded{};
  const Bounded larger = {std::isnan(along.value) ? along.value : std::max(along.value, least.value),
                          std::max(along.error, least.error)};
  const Bounded noise = Bounded{64 * precision.epsilon, 0} * beta * dot(s, h, h);
  const Bounded alpha = constant(head.hyper.alpha), excess = along - noise;
  const Bounded d = (noise.value > alpha.value ? noise : alpha) + larger;
  const bool is_known = d.is_known() && (!std::isfinite(d.value) || std::fabs(d.value) > d.error);
  const bool happens = std::isfinite(d.value) && d.value > 0;
  if (!is_known || (happens && !(std::fabs(excess.value) > excess.error))) {
    tally.unknown += s;
    return;
  }
  const bool has_row = happens && excess.value > 0;
  if (now.count != count + has_row) fail("count", 0, now.count, {static_cast<long double>(count + has_row), 0});
  const Bounded keep = constant(1) - constant(head.hyper.forget);
  const bool forgets = happens && head.hyper.forget != 0;
  check("beta", now.beta, 0, forgets ? keep * beta + constant(head.hyper.forget) : beta, now.dtype);
  const Bounded root = has_row ? sqrt(d) : Bounded{};
  for (int64_t i = 0; i < now.count; ++i) {
    for (int64_t j = 0; j < s; ++j) {
      const Bounded u = i < count ? before.row(i, j) : at(j) / root;
      check("K", now.rows, i * s + j, forgets ? sqrt(keep) * u : u, now.dtype);
    }
  }
}

void check_same_form(const RankForm& now, const RankForm& other) {
  if (now.count != other.count) fail("count, by another way", 0, now.count, {static_cast<long double>(other.count), 0});
  check_same_bits("beta, by another way", now.beta, other.beta);
  for (int64_t i = 0; i < now.count * now.s; ++i) {
    const long double a = now.rows.get(i), b = other.rows.get(i);
    if (a != b && !(std::isnan(a) && std::isnan(b))) fail("K, by another way", i, a, {b, 0});
  }
}

}  // namespace

void try_rank_step(Input& input) {
  Head head(input, kLargestSize, 1);
  head.hyper.normalize = false;
  const int64_t s = head.s, R = input.size(kMostRows), count = input.flag() ? R - 1 : input.below(unsigned(R));
  RankForm P(input, head.accumulate, s, R + 1, count);  // with room for one more, so that nothing is compressed
  const int64_t repeats = input.below(4);
  const long double noise = std::pow(10.0L, -2 * input.below(9));
  if (repeats == 0 && head.absorbs && !P.absorbed.empty()) {  // features almost as those before
    for (int64_t j = 0; j < s; ++j) {
      head.feature_mean.set(j, P.absorbed[size_t(j)] + noise * head.feature_mean.get(j));
    }
  }
  described =
      "rank_step " +
      words("R", R, "count", count, "repeats", repeats, "projection", P.is_projection, "beta", double(P.beta.get(0))) +
      head.words();
  const Head before = head;
  const RankForm old_P = P;
  RankForm compressed = P.with_capacity(R);
  rank_step(head.step(P.pointers()));

  if (!head.check_unchanged(before)) {
    if (P.count != count) fail("count after an overflow", 0, P.count, {static_cast<long double>(count), 0});
    check_same_bits("beta after an overflow", P.beta, old_P.beta);
    check_same_bits("K after an overflow", P.rows, old_P.rows);
    return;
  }
  if (head.absorbs) {
    check_absorbed(before, old_P, P);
    if (P.is_projection) check_range(P);
  } else {
    check_same_form(P, old_P);
  }
  const RankForm& used = head.hyper.absorb_before ? P : old_P;
  for (int64_t c = 0; c < head.C; ++c) {
    const auto g = [&](int64_t j) { return Bounded{before.grad.get(c * s + j), 0}; };
    const std::vector<Bounded> t = used.along_rows(g);
    head.check_row(before, c, [&](int64_t j) { return used.project(g, [&](int64_t i) { return t[size_t(i)]; }, j); });
  }

  // The same with a compression at the end, if there are R rows now: the same bits as one after the other.
  Head again = before;
  rank_step(again.step(compressed.pointers()));
  check_same_bits("weight, by another way", again.weight, head.weight);
  check_same_bits("momentum_buffer, by another way", again.momentum_buffer, head.momentum_buffer);
  RankForm settled = P.with_capacity(R);
  settle(head.accumulate, settled.pointers(), s);
  check_same_form(compressed, settled);
  if (P.count == R) check_compressed(P.with_capacity(R), compressed);
}

void try_compress(Input& input) {
  const DType dtype = input.flag() ? DType::Float64 : DType::Float32;
  const int64_t s = input.size(kLargestSize), R = std::min(input.size(kMostRows), s);  // the optimizer takes no more
  precision = format_of(dtype).precision();
  RankForm P(input, dtype, s, R, R);
  const RankForm full = P;
  described = "compress " +
              words("s", s, "R", R, "dtype", int(dtype), "projection", P.is_projection, "beta", double(P.beta.get(0)));
  settle(dtype, P.pointers(), s);
  check_compressed(full, P);
}

}  // namespace fuzz
