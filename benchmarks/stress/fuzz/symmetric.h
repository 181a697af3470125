// Eigenvalues and eigenvectors of a symmetric matrix in long double, by Jacobi's rotations: slow and plain.
#pragma once

#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

namespace fuzz {

using Matrix = std::vector<long double>;

/// Of the symmetric A (n, n): the eigenvalues, falling, and the eigenvectors, one a row.
struct Symmetric {
  Matrix values, vectors;

  Symmetric(Matrix A, int64_t n) : values(size_t(n)), vectors(size_t(n * n)) {
    long double norm = 0;
    for (const long double a : A) norm = std::hypot(norm, a);
    for (int64_t i = 0; i < n; ++i) vectors[size_t(i * n + i)] = 1;
    bool is_diagonal = false;
    for (int sweep = 0; sweep < 40 && !is_diagonal; ++sweep) {
      is_diagonal = true;
      for (int64_t p = 0; p < n; ++p) {
        for (int64_t q = p + 1; q < n; ++q) {
          const long double off = A[size_t(p * n + q)];
          if (!(std::fabs(off) > 1e-20L * norm)) continue;
          is_diagonal = false;
          const long double theta = (A[size_t(q * n + q)] - A[size_t(p * n + p)]) / (2 * off);
          const long double t = (theta < 0 ? -1 : 1) / (std::fabs(theta) + std::hypot(theta, 1.0L));
          const long double cosine = 1 / std::hypot(t, 1.0L), sine = t * cosine;
          rotate(A, n, p * n, q * n, 1, cosine, sine);
          rotate(A, n, p, q, n, cosine, sine);
          rotate(vectors, n, p * n, q * n, 1, cosine, sine);
        }
      }
    }
    for (int64_t i = 0; i < n; ++i) values[size_t(i)] = A[size_t(i * n + i)];
    for (int64_t i = 0; i < n; ++i) {
      int64_t largest = i;
      for (int64_t m = i + 1; m < n; ++m) largest = values[size_t(m)] > values[size_t(largest)] ? m : largest;
      std::swap(values[size_t(i)], values[size_t(largest)]);
      for (int64_t j = 0; j < n; ++j) std::swap(vectors[size_t(i * n + j)], vectors[size_t(largest * n + j)]);
    }
  }

 private:
  static void rotate(Matrix& M, int64_t n, int64_t from, int64_t to, int64_t stride, long double cosine,
                     long double sine) {
    for (int64_t k = 0; k < n; ++k) {
      long double &a = M[size_t(from + k * stride)], &b = M[size_t(to + k * stride)];
      const long double x = a, y = b;
      a = cosine * x - sine * y;
      b = sine * x + cosine * y;
    }
  }
};

}  // namespace fuzz
