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
  static constexpr int kMantissa = 23, kBias = 127, kDegree = 7;
  static constexpr float kLowest = -87.0f;  // exp of less is no normal number
};
template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
  static constexpr int kMantissa = 52, kBias = 1023, kDegree = 13;
  static constexpr double kLowest = -708.0;
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

// e^x for x <= 0, 0 for far below; NaN stays NaN. x = n ln 2 + r, and e^r by its Taylor polynomial on |r| <= ln 2 / 2.
template <class A>
inline Vec<A> exp_nonpositive(Vec<A> x) {
  using S = Simd<A>;
  constexpr A round = A(3) * A(int64_t(1) << (S::kMantissa - 1));  // adding it leaves n in the low bits
  // ln 2 in two parts, the first with so few bits that n times it is exact
  constexpr A ln2_high = sizeof(A) == 4 ? A(0x1.63p-1) : A(0x1.62e42feep-1);
  constexpr A ln2_low = sizeof(A) == 4 ? A(-0x1.bd0105c610ca8p-13) : A(0x1.a39ef35793c76p-33);
  const Vec<A> clamped = x < S::kLowest ? broadcast<A>(S::kLowest) : x;
  const Vec<A> shifted = clamped * A(1.4426950408889634) + round;
  const Vec<A> n = shifted - round;
  const Vec<A> r = (clamped - n * ln2_high) - n * ln2_low;
  Vec<A> p = broadcast<A>(1);
#pragma GCC unroll 16
  for (int i = S::kDegree; i > 0; --i) p = p * (r * (A(1) / A(i))) + A(1);
  typename S::I exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  exponent = (exponent + S::kBias) << S::kMantissa;
  Vec<A> power;
  std::memcpy(&power, &exponent, sizeof power);
  return x < S::kLowest ? Vec<A>{} : p * power;
}

}  // namespace mla_ext::cpu::MLA_EXT_ISA
