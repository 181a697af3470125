// Eigenvalues and eigenvectors of a small symmetric matrix, in double and always in the same order of operations.
#pragma once

#include <cmath>
#include <limits>

#include "scratch.h"
#include "vector.h"

namespace mla_ext::cpu::MLA_EXT_ISA {

// y += factor * x.
inline void add_scaled(double* y, const double* x, double factor, int64_t n) {
  int64_t j = 0;
  for (; j + kLanes<double> <= n; j += kLanes<double>) store(y + j, load(y + j) + broadcast(factor) * load(x + j));
  for (; j < n; ++j) y[j] += factor * x[j];
}

// The rows x and y turned: x becomes cosine x + sine y.
inline void rotate(double* x, double* y, double cosine, double sine, int64_t n) {
  const Vec<double> c = broadcast(cosine), s = broadcast(sine);
  int64_t j = 0;
  for (; j + kLanes<double> <= n; j += kLanes<double>) {
    const Vec<double> a = load(x + j), b = load(y + j);
    store<double>(x + j, c * a + s * b);
    store<double>(y + j, c * b - s * a);
  }
  for (; j < n; ++j) {
    const double a = x[j], b = y[j];
    x[j] = cosine * a + sine * b;
    y[j] = cosine * b - sine * a;
  }
}

// Householder reflections make the symmetric A (n, n) tridiagonal: `diagonal` and `beside`, with beside[0] = 0.
// A becomes Q^T with Q^T A Q tridiagonal.
inline void tridiagonalise(double* A, double* diagonal, double* beside, int64_t n) {
  Scratch<double> tau(n), w(n);
  beside[0] = 0;
  // Whole vectors of the first i columns. Those of a row r < i that lie beyond are not used any more.
  const auto whole = [&](int64_t i) {
    const int64_t rounded = (i + kLanes<double> - 1) / kLanes<double> * kLanes<double>;
    return rounded < n ? rounded : n;
  };
  // Row i, from its end on: v (length i, stored in row i) takes all of the row's first i - 1 entries to 0.
  for (int64_t i = n - 1; i > 0; --i) {
    double* v = A + i * n;
    double scale = 0;
    for (int64_t j = 0; j < i; ++j) scale = std::fabs(v[j]) > scale ? std::fabs(v[j]) : scale;
    tau[i] = 0;
    beside[i] = v[i - 1];
    double rest = 0;
    for (int64_t j = 0; j + 1 < i; ++j) rest += (v[j] / (scale > 0 ? scale : 1)) * (v[j] / (scale > 0 ? scale : 1));
    if (rest == 0) continue;
    const double x = v[i - 1] / scale, norm = std::sqrt(rest + x * x), alpha = x > 0 ? -norm : norm;
    for (int64_t j = 0; j < i; ++j) v[j] /= scale;
    v[i - 1] = x - alpha;
    tau[i] = 2 / (rest + v[i - 1] * v[i - 1]);
    beside[i] = alpha * scale;
    // A <- (I - tau v v^T) A (I - tau v v^T) = A - v u^T - u v^T on the first i rows and columns.
    for (int64_t j = 0; j < n; ++j) w[j] = 0;
    for (int64_t r = 0; r < i; ++r) add_scaled(w.get(), A + r * n, tau[i] * v[r], whole(i));
    double half = 0;
    for (int64_t j = 0; j < i; ++j) half += w[j] * v[j];
    half *= tau[i] / 2;
    for (int64_t j = 0; j < i; ++j) w[j] -= half * v[j];
    for (int64_t r = 0; r < i; ++r) {
      add_scaled(A + r * n, w.get(), -v[r], whole(i));
      add_scaled(A + r * n, v, -w[r], whole(i));
    }
  }
  for (int64_t i = 0; i < n; ++i) diagonal[i] = A[i * n + i];
  // Q = H_{n-1} ... H_1, built from H_1 on in the leading block that grows, so that each v is still in its row.
  for (int64_t i = 0; i < n; ++i) {
    const double* v = A + i * n;
    if (i > 0 && tau[i] != 0) {
      for (int64_t j = 0; j < n; ++j) w[j] = 0;
      for (int64_t r = 0; r < i; ++r) add_scaled(w.get(), A + r * n, tau[i] * v[r], whole(i));
      for (int64_t r = 0; r < i; ++r) add_scaled(A + r * n, w.get(), -v[r], whole(i));
    }
    for (int64_t j = 0; j < i; ++j) A[i * n + j] = A[j * n + i] = 0;
    A[i * n + i] = 1;
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < i; ++j) {
      const double x = A[i * n + j];
      A[i * n + j] = A[j * n + i];
      A[j * n + i] = x;
    }
  }
}

// QL iterations with implicit shifts: d becomes the eigenvalues, and the rows of V, Q^T before, the eigenvectors.
// False: some did not come out.
inline bool diagonalise(double* d, double* e, double* V, int64_t n) {
  for (int64_t i = 1; i < n; ++i) e[i - 1] = e[i];
  e[n - 1] = 0;
  double norm = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double size = std::fabs(d[i]) + std::fabs(e[i]);
    norm = size > norm ? size : norm;
  }
  const double negligible = std::numeric_limits<double>::epsilon() / 2 * norm;
  for (int64_t l = 0; l < n; ++l) {
    for (int iteration = 0;; ++iteration) {
      int64_t m = l;
      while (m + 1 < n && std::fabs(e[m]) > negligible) ++m;
      if (m == l) break;
      if (iteration == 60) return false;  // 8 were the most that any matrix took
      double g = (d[l + 1] - d[l]) / (2 * e[l]);
      const double root = std::sqrt(g * g + 1);
      g = d[m] - d[l] + e[l] / (g + (g < 0 ? -root : root));
      double sine = 1, cosine = 1, p = 0;
      bool underflow = false;
      for (int64_t i = m - 1; i >= l; --i) {
        const double f = sine * e[i], b = cosine * e[i], r = std::sqrt(f * f + g * g);
        e[i + 1] = r;
        if (r == 0) {
          d[i + 1] -= p;
          e[m] = 0;
          underflow = true;
          break;
        }
        sine = f / r;
        cosine = g / r;
        g = d[i + 1] - p;
        const double t = (d[i] - g) * sine + 2 * cosine * b;
        p = sine * t;
        d[i + 1] = g + p;
        g = cosine * t - b;
        rotate(V + (i + 1) * n, V + i * n, cosine, sine, n);
      }
      if (underflow) continue;
      d[l] -= p;
      e[l] = g;
      e[m] = 0;
    }
  }
  return true;
}

// The symmetric V (n, n) becomes its eigenvectors, one a row, by falling eigenvalue. The error of an eigenvalue is some
// epsilon of the largest one, at any scale. All are NaN if V holds a number that is not finite, or they do not come
// out.
inline void eigen(double* V, double* values, int64_t n) {
  double largest = 0;
  bool found = true;
  for (int64_t i = 0; i < n * n; ++i) {
    found = found && std::isfinite(V[i]);
    largest = std::fabs(V[i]) > largest ? std::fabs(V[i]) : largest;
  }
  int exponent = 0;
  std::frexp(largest, &exponent);
  // Then no square overflows, and none that counts underflows. Exact; in two steps, as 2^1074 is no double.
  const double half = std::ldexp(1.0, -exponent / 2), other = std::ldexp(1.0, -exponent - (-exponent / 2));
  for (int64_t i = 0; i < n * n; ++i) V[i] = V[i] * half * other;
  Scratch<double> beside(n);
  tridiagonalise(V, values, beside.get(), n);
  found = diagonalise(values, beside.get(), V, n) && found;
  for (int64_t i = 0; i < n; ++i) {
    values[i] = found ? values[i] / half / other : std::numeric_limits<double>::quiet_NaN();
  }
  for (int64_t i = 0; i < n; ++i) {
    int64_t largest = i;
    for (int64_t m = i + 1; m < n; ++m) largest = values[m] > values[largest] ? m : largest;
    if (largest == i) continue;
    const double value = values[i];
    values[i] = values[largest];
    values[largest] = value;
    for (int64_t j = 0; j < n; ++j) {
      const double x = V[i * n + j];
      V[i * n + j] = V[largest * n + j];
      V[largest * n + j] = x;
    }
  }
}

}  // namespace mla_ext::cpu::MLA_EXT_ISA
