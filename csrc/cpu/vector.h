// One SIMD register of the instruction set this file is compiled for, in GCC and Clang's vector extension.
#pragma once

#include <cstdint>
#include <cstring>

namespace mla_ext::cpu::MLA_EXT_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class A>
struct Simd;
template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  static constexpr int kMantissa = 23, kDegree = 7;
  static constexpr float kLowest = -86.0f;  // less adds nothing to a sum with e^0
};
template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
  static constexpr int kMantissa = 52, kDegree = 13;
  static constexpr double kLowest = -707.0;
};

template <class A>
using Vec = typename Simd<A>::V;
template <class A>
constexpr int kLanes = kVectorBytes / int(sizeof(A));

template <class A>
inline Vec<A> load(const A* p) {
  Vec<A> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class A>
inline void store(A* p, Vec<A> v) {
  std::memcpy(p, &v, sizeof v);
}
// The first n lanes, n <= kLanes; the others are 0, and not stored.
template <class A>
inline Vec<A> load_part(const A* p, int64_t n) {
  Vec<A> v{};
  std::memcpy(&v, p, sizeof(A) * n);
  return v;
}
template <class A>
inline void store_part(A* p, Vec<A> v, int64_t n) {
  std::memcpy(p, &v, sizeof(A) * n);
}
template <class A>
inline Vec<A> broadcast(A x) {
  return x - Vec<A>{};
}
template <class A>
inline A sum(Vec<A> v) {
  A total = 0;
  for (int lane = 0; lane < kLanes<A>; ++lane) total += v[lane];
  return total;
}

template <class A>
inline A max(Vec<A> v) {
  A largest = v[0];
  for (int lane = 1; lane < kLanes<A>; ++lane) largest = v[lane] > largest ? v[lane] : largest;
  return largest;
}

template <class A>
constexpr A factorial(int n) {
  return n < 2 ? A(1) : n * factorial<A>(n - 1);
}

// e^x for kLowest <= x <= 0. x = n ln 2 + r, and e^r by its Taylor polynomial on |r| <= ln 2 / 2, odd and even powers
// apart, to be ready sooner. The rounding of n ln 2 costs a relative error of |x| epsilon, as much as that of x does.
template <class A>
inline Vec<A> exp_nonpositive(Vec<A> x) {
  using S = Simd<A>;
  constexpr A round = A(3) * A(int64_t(1) << (S::kMantissa - 1));  // adding it leaves n in the low bits
  const Vec<A> shifted = x * A(1.4426950408889634) + round;
  const Vec<A> r = x - (shifted - round) * A(0.6931471805599453);
  const Vec<A> r2 = r * r;
  Vec<A> odd = broadcast<A>(1 / factorial<A>(S::kDegree)), even = broadcast<A>(1 / factorial<A>(S::kDegree - 1));
#pragma GCC unroll 8
  for (int i = S::kDegree - 2; i > 0; i -= 2) {
    odd = odd * r2 + 1 / factorial<A>(i);
    even = even * r2 + 1 / factorial<A>(i - 1);
  }
  const Vec<A> p = odd * r + even;
  typename S::I n, bits;
  std::memcpy(&n, &shifted, sizeof n);
  std::memcpy(&bits, &p, sizeof bits);
  bits += n << S::kMantissa;  // times 2^n
  Vec<A> result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

}  // namespace mla_ext::cpu::MLA_EXT_ISA
