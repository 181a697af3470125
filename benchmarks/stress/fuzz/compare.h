// Compares what a kernel computed with what a plain loop expects. Whatever differs ends the program.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

#include "bounded.h"
#include "input.h"

namespace fuzz {

/// Says at the end of the program what has been compared.
struct Tally {
  long long inputs = 0, compared = 0, unknown = 0;

  ~Tally() {
    std::printf("%lld inputs, %lld numbers compared, %lld left open by overflow or cancellation\n", inputs, compared,
                unknown);
  }
};

inline Tally tally;
inline std::string described;  // this input

/// "name value name value ...".
inline std::string words() { return ""; }
template <class T, class... Rest>
std::string words(const char* name, T value, Rest... rest) {
  return std::string(name) + " " + std::to_string(value) + " " + words(rest...);
}

[[noreturn]] inline void fail(const char* what, int64_t index, long double got, Bounded expected) {
  std::fprintf(stderr, "%s[%lld]: got %.9Lg, expected %.9Lg within %.3Lg\n%s\n", what, (long long)index, got,
               expected.value, expected.error, described.c_str());
  std::abort();
}

inline void check(const char* what, const Array& array, int64_t i, Bounded expected, DType dtype) {
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

inline void check_at_most(const char* what, int64_t index, long double got, long double most) {
  ++tally.compared;
  if (!(got <= most)) fail(what, index, got, {0, most});
}

inline void check_same_bits(const char* what, const Array& now, const Array& before) {
  if (now.has_same_bits(before)) return;
  std::fprintf(stderr, "%s: changed, and should not have\n%s\n", what, described.c_str());
  std::abort();
}

}  // namespace fuzz
