// What a fuzzer's bytes stand for: sizes, flags, numbers, and arrays of every storage type.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <random>
#include <vector>

#include "backend.h"
#include "bounded.h"

namespace fuzz {

/// Reads the bytes one after the other, zeros when they are used up.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  unsigned byte() { return at_ < size_ ? data_[at_++] : 0; }
  bool flag() { return byte() & 1; }
  int64_t below(unsigned n) { return static_cast<int64_t>(byte() % n); }
  /// 1 … largest, small ones more often.
  int64_t size(int64_t largest) {
    const unsigned kind = byte();
    const int64_t any = static_cast<int64_t>(byte() << 8 | byte());
    return 1 + any % (kind < 200 ? std::min<int64_t>(largest, 40) : largest);
  }
  /// One of the given numbers, or any up to the last.
  double number(std::initializer_list<double> usual) {
    const unsigned choice = byte();
    if (choice % (usual.size() + 1) < usual.size()) return usual.begin()[choice % (usual.size() + 1)];
    return (usual.end()[-1]) * static_cast<double>(byte()) / 255;
  }

 private:
  const uint8_t* data_;
  size_t size_, at_ = 0;
};

inline size_t bytes_of(DType dtype) { return dtype == DType::Float64 ? 8 : dtype == DType::Float32 ? 4 : 2; }
inline DType accumulate_type(DType dtype) { return dtype == DType::Float64 ? DType::Float64 : DType::Float32; }

/// Exponent bias, explicit bits of the mantissa, and the sizes of the smallest and the largest number.
struct Format {
  int bias, mantissa;
  Precision precision() const {
    const long double epsilon = std::ldexp(1.0L, -mantissa);
    return {epsilon, std::ldexp(epsilon, 1 - bias), std::ldexp(2 - epsilon, bias)};
  }
};
inline Format format_of(DType dtype) {
  switch (dtype) {
    case DType::Float64:
      return {1023, 52};
    case DType::Float32:
      return {127, 23};
    case DType::BFloat16:
      return {127, 7};
    case DType::Float16:
      return {15, 10};
  }
  std::abort();
}

/// Memory of exactly the size asked for, `offset` elements past 16-byte alignment, its elements read and written as
/// numbers by arithmetic on their bits. Absent: a null pointer.
class Array {
 public:
  Array() = default;
  Array(DType dtype, int64_t count, int64_t offset = 0)
      : dtype_(dtype), count_(count), skipped_(size_t(offset) * bytes_of(dtype)), memory_(bytes() + skipped_, 0xff) {}

  void* data() { return memory_.empty() && count_ < 0 ? nullptr : memory_.data() + skipped_; }
  int64_t count() const { return count_; }
  bool is_present() const { return count_ >= 0; }
  size_t bytes() const { return size_t(std::max<int64_t>(count_, 0)) * bytes_of(dtype_); }
  bool has_same_bits(const Array& other) const { return memory_ == other.memory_; }

  long double get(int64_t i) const {
    const Format f = format_of(dtype_);
    const uint64_t bits = raw(i), mantissa = bits & ((uint64_t(1) << f.mantissa) - 1);
    const int exponent = int(bits >> f.mantissa & uint64_t(2 * f.bias + 1));
    const long double sign = bits >> (bytes_of(dtype_) * 8 - 1) ? -1 : 1;
    if (exponent == 2 * f.bias + 1) return mantissa ? std::numeric_limits<long double>::quiet_NaN() : sign * INFINITY;
    const uint64_t whole = mantissa | uint64_t(exponent > 0) << f.mantissa;
    return sign * std::ldexp(static_cast<long double>(whole), std::max(exponent, 1) - f.bias - f.mantissa);
  }

  /// The nearest number of the type.
  void set(int64_t i, long double x) {
    const Format f = format_of(dtype_);
    const uint64_t sign = uint64_t(std::signbit(x)) << (bytes_of(dtype_) * 8 - 1);
    uint64_t bits = uint64_t(2 * f.bias + 1) << f.mantissa;  // infinite
    if (std::isnan(x)) {
      bits |= uint64_t(1) << (f.mantissa - 1);
    } else if (std::fabs(x) <= f.precision().largest) {
      const int exponent = x == 0 ? 1 - f.bias : std::max(std::ilogb(x), 1 - f.bias);
      // A mantissa rounded up to the next power of two carries into the exponent.
      bits = uint64_t(std::nearbyint(std::ldexp(std::fabs(x), f.mantissa - exponent)));
      bits += uint64_t(exponent + f.bias - 1) << f.mantissa;
    }
    bits |= sign;
    std::memcpy(static_cast<unsigned char*>(data()) + size_t(i) * bytes_of(dtype_), &bits, bytes_of(dtype_));
  }

 private:
  uint64_t raw(int64_t i) const {
    uint64_t bits = 0;
    std::memcpy(&bits, memory_.data() + skipped_ + size_t(i) * bytes_of(dtype_), bytes_of(dtype_));
    return bits;
  }

  DType dtype_ = DType::Float32;
  int64_t count_ = -1;
  size_t skipped_ = 0;
  std::vector<unsigned char> memory_;
};

/// Draws the numbers of an array: usual, zero, tiny, huge, all the same, far apart, or with NaN and infinity among
/// them.
class Numbers {
 public:
  explicit Numbers(Input& input) : kind_(input.below(9)), scale_(input.below(13)), generator_(input.byte()) {}

  long double next(DType dtype) {
    const long double x = normal_(generator_);
    const Precision p = format_of(dtype).precision();
    switch (kind_) {
      case 0:
        return 0;
      case 1:
        return x * p.tiny * std::ldexp(1.0L, int(generator_() % 12));  // denormal
      case 2:
        return x * p.largest / 8;
      case 3:
        return x * std::pow(10.0L, int(generator_() % 13) - 6);
      case 4:
        return 1;
      case 5:
        return generator_() % 8 ? x : special(p);
      default:
        return x * std::pow(10.0L, (scale_ - 6) / 2);
    }
  }
  void fill(Array& array, DType dtype) {
    for (int64_t i = 0; i < array.count(); ++i) array.set(i, next(dtype));
  }

 private:
  long double special(Precision p) {
    const long double values[] = {NAN, INFINITY, -INFINITY, p.largest, -p.largest, -0.0L, p.tiny};
    return values[generator_() % 7];
  }

  int64_t kind_, scale_;
  std::mt19937 generator_;
  std::normal_distribution<double> normal_;
};

inline DType any_dtype(Input& input) { return DType(input.below(4)); }

inline Array numbers(Input& input, DType dtype, int64_t count) {
  Array array(dtype, count, input.below(4));
  Numbers(input).fill(array, dtype);
  return array;
}

}  // namespace fuzz
