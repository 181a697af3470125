#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace mla_ext::cpu {

namespace baseline {
extern const Kernels kernels;
}
#ifdef MLA_EXT_HAVE_X86
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

namespace {

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool runs_here;
};

Isa choose() {
  const Isa widest_first[] = {
#ifdef MLA_EXT_HAVE_X86
      {"avx512", &avx512::kernels,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")},
      {"avx2", &avx2::kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {"baseline", &baseline::kernels, true},
  };
  const char* wanted = std::getenv("MLA_EXT_CPU_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  std::string usable;
  for (const Isa& isa : widest_first) {
    if (!isa.runs_here) continue;
    if (any || std::string(wanted) == isa.name) return isa;
    usable += usable.empty() ? isa.name : std::string(", ") + isa.name;
  }
  throw std::runtime_error("MLA_EXT_CPU_ISA: expected one that runs on this CPU (" + usable + "), got '" + wanted +
                           "'");
}

const Isa& chosen() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace

const Kernels& kernels() { return *chosen().kernels; }

bool blas_is_faster(int64_t rows, int64_t s) {
#ifdef MLA_EXT_HAVE_X86
  // MKL, which PyTorch brings, keeps to AVX2 on AMD processors. Measured on Zen 5, float32 (benchmarks/NOTES.md).
  static const bool avoids_avx512 = chosen().kernels == &avx512::kernels && __builtin_cpu_is("amd");
#else
  static const bool avoids_avx512 = false;
#endif
  return rows >= 32 && !(avoids_avx512 && s >= 256);
}

const char* isa_name() { return chosen().name; }

}  // namespace mla_ext::cpu
