// Compiled once for each instruction set: MLA_EXT_ISA is the namespace, the compiler's flags are the rest. What is
// included here may instantiate nothing that another file shares (see scratch.h).
#include "kernels.h"

#include "entropy_fusion.h"
#include "feature_mean.h"
#include "head_step.h"
#include "pending.h"
#include "plain_sgd.h"
#include "product.h"
#include "rls_update.h"

namespace mla_ext::cpu::MLA_EXT_ISA {

namespace {

// Calls f with a value of the dtype's storage type.
template <class F>
void dispatch(DType dtype, const F& f) {
  switch (dtype) {
    case DType::Float32:
      return f(float{});
    case DType::Float64:
      return f(double{});
    case DType::BFloat16:
      return f(BFloat16{});
    case DType::Float16:
      return f(Float16{});
  }
}

void any_feature_mean(DType dtype, const void* features, void* mean, int64_t N, int64_t s, ParallelFor parallel_for) {
  dispatch(dtype, [&](auto t) { feature_mean<decltype(t)>(features, mean, N, s, parallel_for); });
}

void any_rls_update(DType accumulate, const RlsUpdate& update, ParallelFor parallel_for) {
  dispatch(accumulate, [&](auto t) { rls_update<typename Accumulate<decltype(t)>::type>(update, parallel_for); });
}

void any_head_step(DType dtype, const HeadStep& step, ParallelFor parallel_for) {
  dispatch(dtype, [&](auto t) { head_step<decltype(t)>(step, parallel_for); });
}

void any_project(DType accumulate, const void* projection, const void* X, int64_t n, const void* h, int64_t s,
                 void* out, ParallelFor parallel_for) {
  dispatch(accumulate, [&](auto t) {
    using A = typename Accumulate<decltype(t)>::type;
    project<A>(static_cast<const A*>(projection), static_cast<const A*>(X), n, static_cast<const A*>(h), s,
               static_cast<A*>(out), parallel_for);
  });
}

void any_fold(DType accumulate, void* projection, int64_t s, const Pending& pending, ParallelFor parallel_for) {
  dispatch(accumulate, [&](auto t) {
    using A = typename Accumulate<decltype(t)>::type;
    fold<A>(projection, s, pending, A(1), parallel_for);
  });
}

void any_correct(DType accumulate, const void* X, void* Z, int64_t n, int64_t s, const Pending& pending,
                 ParallelFor parallel_for) {
  dispatch(accumulate,
           [&](auto t) { correct<typename Accumulate<decltype(t)>::type>(X, Z, n, s, pending, parallel_for); });
}

void any_entropy_fusion(DType dtype, const EntropyFusion& fusion, ParallelFor parallel_for) {
  dispatch(dtype, [&](auto t) { entropy_fusion<decltype(t)>(fusion, parallel_for); });
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {any_feature_mean, any_rls_update, any_head_step,      any_project,
                         any_fold,         any_correct,    any_entropy_fusion, plain_sgd};

}  // namespace mla_ext::cpu::MLA_EXT_ISA
