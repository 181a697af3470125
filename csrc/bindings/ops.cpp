// The operations as torch ops over LibTorch's stable ABI: schemas, and the CPU implementations.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "bindings/common.h"
#include "cpu/isa.h"

namespace {

using namespace mla_ext::bindings;
using mla_ext::DType;

constexpr DeviceType kDevice = DeviceType::CPU;

void parallel_for(int64_t begin, int64_t end, int64_t grain, mla_ext::cpu::Body body, void* context) {
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) { body(first, last, context); });
}

// P = base or beta I, minus the rows; nullptr and 0 for what is not there.
mla_ext::Projection projection_of(const std::optional<Tensor>& base, const std::optional<Tensor>& beta,
                                  const std::optional<Tensor>& rows, const std::optional<Tensor>& count,
                                  const std::optional<Tensor>& nu, int64_t s, ScalarType accumulate) {
  check_rows(base, beta, rows, count, s, accumulate, kDevice);
  check(nu, "nu", {}, accumulate, kDevice);
  return {pointer(base),
          pointer(beta),
          pointer(rows),
          static_cast<int64_t*>(pointer(count)),
          rows.has_value() ? rows->size(0) : 0,
          pointer(nu)};
}

// G B by PyTorch's BLAS, for a workspace.
struct BlasProduct {
  const Tensor& grad;
  const Tensor& base;
  Tensor out;

  static void run(void* context) {
    BlasProduct& product = *static_cast<BlasProduct*>(context);
    matmul_into(torch::stable::to(product.grad, product.base.scalar_type()), product.base, product.out);
  }
};

Tensor feature_mean(const Tensor& features) {
  check_features(features, kDevice);
  const DType dtype = dtype_of(features, "features");
  Tensor mean = torch::stable::new_empty(features, {features.size(1)}, accumulate_type(features));
  mla_ext::cpu::kernels().feature_mean(dtype, features.data_ptr(), mean.data_ptr(), features.size(0), features.size(1),
                                       parallel_for);
  return mean;
}

void rls_update_(Tensor projection, const Tensor& feature_mean, double alpha, double forget, bool normalize) {
  check_rls_update(projection, feature_mean, kDevice);
  mla_ext::Hyperparameters hyper;
  hyper.alpha = alpha;
  hyper.forget = forget;
  hyper.normalize = normalize;
  mla_ext::cpu::kernels().rls_update(dtype_of(projection, "projection"), projection.data_ptr(), feature_mean.data_ptr(),
                                     projection.size(0), hyper, parallel_for);
}

void head_step_(Tensor weight, const Tensor& grad, std::optional<Tensor> momentum_buffer, std::optional<Tensor> base,
                std::optional<Tensor> beta, std::optional<Tensor> rows, std::optional<Tensor> count,
                const std::optional<Tensor>& feature_mean, Tensor step, double lr, double momentum, double dampening,
                double weight_decay, bool nesterov, bool maximize, double alpha, double forget, bool absorb_before,
                bool normalize, const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                const std::optional<Tensor>& lr_tensor, const std::optional<Tensor>& alpha_tensor,
                std::optional<Tensor> nu, const std::optional<Tensor>& product) {
  check_head_step(weight, grad, momentum_buffer, base, feature_mean, step, kDevice);
  STD_TORCH_CHECK(!product.has_value(), "product: expected none; the CPU kernels multiply themselves");
  const int64_t C = weight.size(0), s = weight.size(1);
  const mla_ext::HeadStep arguments{
      dtype_of(weight, "weight"),
      C,
      s,
      weight.data_ptr(),
      grad.data_ptr(),
      pointer(momentum_buffer),
      projection_of(base, beta, rows, count, nu, s, accumulate_type(weight)),
      pointer(feature_mean),
      static_cast<float*>(step.data_ptr()),
      {lr, momentum, dampening, weight_decay, alpha, forget, nesterov, maximize, absorb_before, normalize,
       number(lr_tensor, "lr_tensor", kDevice), number(alpha_tensor, "alpha_tensor", kDevice)},
      number(grad_scale, "grad_scale", kDevice),
      number(found_inf, "found_inf", kDevice)};
  if (rows.has_value()) {
    const int64_t used = *arguments.projection.count;
    STD_TORCH_CHECK(used >= 0 && used < rows->size(0), "count: expected 0 to ", rows->size(0) - 1, ", got ", used);
    STD_TORCH_CHECK(!normalize, "normalize: expected false with rows");
    STD_TORCH_CHECK(forget == 0 || beta.has_value(), "forget: expected 0 with base and rows");
  }
  mla_ext::cpu::Workspace workspace{};
  if (!base.has_value()) return mla_ext::cpu::kernels().head_step(arguments, workspace, parallel_for);

  Tensor projected = torch::stable::new_empty(*base, {C + 1, s});
  BlasProduct blas{grad, *base, torch::stable::narrow(projected, 0, 0, C)};
  workspace.projected = projected.data_ptr();
  if (mla_ext::cpu::blas_is_faster(C, s)) {
    // For G alone: the user may have allowed the BLAS to round as B h must not be.
    workspace.product = BlasProduct::run;
    workspace.context = &blas;
  }
  mla_ext::cpu::kernels().head_step(arguments, workspace, parallel_for);
}

void settle_(std::optional<Tensor> base, std::optional<Tensor> beta, Tensor rows, Tensor count) {
  const int64_t s = rows.dim() == 2 ? rows.size(1) : 0;
  const mla_ext::Projection projection = projection_of(base, beta, rows, count, std::nullopt, s, accumulate_type(rows));
  const int64_t used = *projection.count;
  STD_TORCH_CHECK(used >= 0 && used <= rows.size(0), "count: expected 0 to ", rows.size(0), ", got ", used);
  mla_ext::cpu::kernels().settle(dtype_of(rows, "rows"), projection, s, parallel_for);
}

std::tuple<Tensor, Tensor> entropy_fusion(const Tensor& logits, const std::optional<Tensor>& present,
                                          const std::optional<Tensor>& temperatures, bool equal) {
  check_fusion(logits, present, temperatures, kDevice);
  const DType dtype = dtype_of(logits, "logits");
  const int64_t M = logits.size(0), N = logits.size(1), C = logits.size(2);
  Tensor fused = torch::stable::new_empty(logits, {N, C});
  Tensor weights = torch::stable::new_empty(logits, {M, N}, accumulate_type(logits));
  mla_ext::cpu::kernels().entropy_fusion(dtype,
                                         {logits.data_ptr(), static_cast<const bool*>(pointer(present)),
                                          fused.data_ptr(), weights.data_ptr(), M, N, C, pointer(temperatures), equal},
                                         parallel_for);
  return {fused, weights};
}

}  // namespace

// The one definition of every op; a device's library adds its implementation.
STABLE_TORCH_LIBRARY(mla_ext, library) {
  library.def("feature_mean(Tensor features) -> Tensor");
  library.def(
      "rls_update_(Tensor(a!) projection, Tensor feature_mean, float alpha, float forget, bool normalize) -> ()");
  library.def(
      "head_step_(Tensor(a!) weight, Tensor grad, Tensor(b!)? momentum_buffer, Tensor(c!)? base, Tensor(d!)? beta, "
      "Tensor(e!)? rows, Tensor(f!)? count, Tensor? feature_mean, Tensor(g!) step, float lr, float momentum, "
      "float dampening, float weight_decay, bool nesterov, bool maximize, float alpha, float forget, "
      "bool absorb_before, bool normalize, Tensor? grad_scale, Tensor? found_inf, Tensor? lr_tensor=None, "
      "Tensor? alpha_tensor=None, Tensor(h!)? nu=None, Tensor? product=None) -> ()");
  library.def("settle_(Tensor(a!)? base, Tensor(b!)? beta, Tensor(c!) rows, Tensor(d!) count) -> ()");
  library.def(
      "entropy_fusion(Tensor logits, Tensor? present, Tensor? temperatures=None, bool equal=False) -> "
      "(Tensor fused, Tensor weights)");
}

STABLE_TORCH_LIBRARY_IMPL(mla_ext, CPU, library) {
  library.impl("feature_mean", TORCH_BOX(&feature_mean));
  library.impl("rls_update_", TORCH_BOX(&rls_update_));
  library.impl("head_step_", TORCH_BOX(&head_step_));
  library.impl("settle_", TORCH_BOX(&settle_));
  library.impl("entropy_fusion", TORCH_BOX(&entropy_fusion));
}
