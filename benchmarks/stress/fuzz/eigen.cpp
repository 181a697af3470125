// The eigenvectors of csrc/cpu/eigen.h: orthogonal, and A V = V Lambda, to within rounding, at any scale.
#define MLA_EXT_ISA fuzzed
#include "cpu/eigen.h"

#include <vector>

#include "compare.h"
#include "cpu.h"

namespace fuzz {
namespace {

/// Symmetric (n, n), of one of the kinds that are known to be hard.
Array symmetric(Input& input, int64_t n) {
  const DType dtype = DType::Float64;
  Array A(dtype, n * n);
  Numbers drawn(input);
  const int64_t kind = input.below(6), rank = 1 + input.below(8);
  const long double scale = std::pow(10.0L, (input.below(13) - 6) * 25), step = std::pow(10.0L, input.below(5) - 2);
  const Array factors = numbers(input, dtype, rank * n);
  const auto entry = [&](int64_t i, int64_t j) -> long double {
    switch (kind) {
      case 0:  // of any numbers
        return drawn.next(dtype);
      case 1:  // graded
        return std::pow(step, i + j) * (1 + drawn.next(dtype));
      case 2: {  // of low rank
        long double total = 0;
        for (int64_t r = 0; r < rank; ++r) total += factors.get(r * n + i) * factors.get(r * n + j);
        return total * scale;
      }
      case 3:  // one eigenvalue, but for rounding
        return scale * ((i == j) + step * 1e-16L * drawn.next(dtype));
      case 4:  // Wilkinson's: pairs that almost meet
        return scale * (i == j ? std::fabs(i - (n - 1) / 2.0L) : i - j == 1);
      default:  // sparse
        return (i * 7 + j * 3) % (2 + rank) == 0 ? scale * drawn.next(dtype) : 0;
    }
  };
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      A.set(i * n + j, entry(i, j));
      A.set(j * n + i, A.get(i * n + j));
    }
  }
  return A;
}

}  // namespace

void try_eigen(Input& input) {
  const int64_t n = input.size(70);
  Array A = symmetric(input, n);
  described = "eigen " + words("n", n);
  std::vector<double> V(size_t(n * n)), values(static_cast<size_t>(n));
  std::memcpy(V.data(), A.data(), A.bytes());
  mla_ext::cpu::fuzzed::eigen(V.data(), values.data(), n);

  long double norm = 0;
  for (int64_t i = 0; i < n * n; ++i) norm = std::hypot(norm, A.get(i));
  if (!std::isfinite(norm)) {
    const auto number = std::find_if(values.begin(), values.end(), [](double value) { return !std::isnan(value); });
    if (number != values.end()) fail("eigenvalue of what is not finite", number - values.begin(), *number, {});
    return;
  }
  if (norm > format_of(DType::Float64).precision().largest) return;
  const long double epsilon = std::ldexp(1.0L, -52), bound = (4 * n + 32) * epsilon;
  for (int64_t i = 0; i < n; ++i) {
    const double* v = V.data() + i * n;
    if (i > 0) check_at_most("order of eigenvalues", i, values[size_t(i)], values[size_t(i - 1)]);
    for (int64_t j = 0; j < n; ++j) {
      long double product = 0, dot = 0;
      for (int64_t m = 0; m < n; ++m) {
        product += A.get(j * n + m) * v[m];
        dot += static_cast<long double>(V[size_t(j * n + m)]) * v[m];
      }
      const long double residual = std::fabs(product - static_cast<long double>(values[size_t(i)]) * v[j]);
      check_at_most("A v - lambda v", i, residual, bound * norm + 1e-320L);
      check_at_most("V V^T - I", i * n + j, std::fabs(dot - (i == j)), bound);
    }
  }
}

}  // namespace fuzz
