// Numbers that know how far a computation in lower precision may be from them: the plain loops of operations.cpp, in
// long double, give each result and its bound at once.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

namespace fuzz {

/// Of a type: the spacing of numbers at 1, the smallest number above 0, the largest.
struct Precision {
  long double epsilon, tiny, largest;
};

inline Precision precision;  // of the type that the kernels compute in for this input

/// `error` bounds |computed − value|. Infinite: anything may have come out. A value that is not finite comes from
/// inputs that are not, and whatever is computed is then not finite either.
struct Bounded {
  long double value = 0, error = 0;

  bool is_known() const { return error < std::numeric_limits<long double>::infinity(); }
};

/// The result of one operation: what its operands' errors make of it, and its own rounding.
inline Bounded rounded(long double value, long double error, long double magnitude) {
  if (!std::isfinite(value) && std::isfinite(error)) return {value, 0};
  error += precision.epsilon * magnitude + precision.tiny;
  if (!(magnitude + error <= precision.largest)) error = std::numeric_limits<long double>::infinity();
  return {value, error};
}

/// A hyperparameter, given in double.
inline Bounded constant(double x) { return rounded(x, 0, std::fabs(x)); }

inline Bounded operator-(Bounded a) { return {-a.value, a.error}; }
inline Bounded operator+(Bounded a, Bounded b) {
  const long double sum = a.value + b.value;
  return rounded(sum, a.error + b.error, std::max({std::fabs(a.value), std::fabs(b.value), std::fabs(sum)}));
}
inline Bounded operator-(Bounded a, Bounded b) { return a + -b; }

inline long double error_of_product(Bounded a, Bounded b) {
  if (!a.is_known() || !b.is_known()) return std::numeric_limits<long double>::infinity();
  long double error = a.error * b.error;
  if (b.error > 0) error += std::fabs(a.value) * b.error;
  if (a.error > 0) error += std::fabs(b.value) * a.error;
  return error;
}
inline Bounded operator*(Bounded a, Bounded b) {
  const long double value = a.value * b.value;
  return rounded(value, std::isfinite(value) ? error_of_product(a, b) : a.error + b.error, std::fabs(value));
}

inline Bounded operator/(Bounded a, Bounded b) {
  const long double value = a.value / b.value, least = std::fabs(b.value) - b.error;
  if (std::isfinite(b.value) && !(least > 0)) return {value, std::numeric_limits<long double>::infinity()};
  const long double error = std::isfinite(value) && std::isfinite(b.value)
                                ? (a.error + std::fabs(value) * b.error) / least
                                : a.error + b.error;
  return rounded(value, error, std::fabs(value));
}

inline Bounded sqrt(Bounded a) {
  const long double root = std::sqrt(a.value);
  return rounded(root, root > 0 ? a.error / root : std::sqrt(a.error), root);
}

/// Σ a(i) b(i) in any order, with fused operations or without.
template <class F, class G>
Bounded dot(long n, const F& a, const G& b) {
  long double value = 0, error = 0, magnitude = 0;
  for (long i = 0; i < n; ++i) {
    const Bounded x = a(i), y = b(i);
    value += x.value * y.value;
    magnitude += std::fabs(x.value * y.value);
    error += std::isfinite(value) ? error_of_product(x, y) : x.error + y.error;
  }
  return rounded(value, error + n * (precision.epsilon * magnitude + precision.tiny), magnitude);
}

}  // namespace fuzz
