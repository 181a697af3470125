// Compiled once for each instruction set: MLA_EXT_ISA is the namespace, the compiler's flags are the rest. What is
// included here may instantiate nothing that another file shares (see scratch.h).
#include "kernels.h"

#include "entropy_fusion.h"
#include "feature_mean.h"
#include "head_step.h"
#include "plain_sgd.h"
#include "product.h"
#include "rls_update.h"
#include "rows.h"

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

void any_rls_update(DType accumulate, void* base, const void* h, int64_t s, const Hyperparameters& hyper,
                    ParallelFor parallel_for) {
  dispatch(accumulate, [&](auto t) {
    using A = typename Accumulate<decltype(t)>::type;
    rls_update<A>(static_cast<A*>(base), static_cast<const A*>(h), s, hyper, nullptr, parallel_for);
  });
}

void any_head_step(const HeadStep& step, const Workspace& workspace, ParallelFor parallel_for) {
  dispatch(step.dtype, [&](auto t) { head_step<decltype(t)>(step, workspace, parallel_for); });
}

void any_settle(DType accumulate, const Projection& P, int64_t s, ParallelFor parallel_for) {
  dispatch(accumulate, [&](auto t) { settle<typename Accumulate<decltype(t)>::type>(P, s, parallel_for); });
}

void any_entropy_fusion(DType dtype, const EntropyFusion& fusion, ParallelFor parallel_for) {
  dispatch(dtype, [&](auto t) { entropy_fusion<decltype(t)>(fusion, parallel_for); });
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {any_feature_mean, any_rls_update, any_head_step, any_settle, any_entropy_fusion, plain_sgd};

}  // namespace mla_ext::cpu::MLA_EXT_ISA
