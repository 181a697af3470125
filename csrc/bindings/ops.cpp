// The operations as torch ops over LibTorch's stable ABI: schemas, and the CPU implementations.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "bindings/common.h"
#include "cpu/isa.h"

namespace {

using namespace mla_ext::bindings;
using mla_ext::cpu::DType;

constexpr DeviceType kDevice = DeviceType::CPU;

DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::Float32;
    case ScalarType::Double:
      return DType::Float64;
    case ScalarType::BFloat16:
      return DType::BFloat16;
    case ScalarType::Half:
      return DType::Float16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, float64, bfloat16 or float16");
  }
  return DType::Float32;
}

double scalar(const std::optional<Tensor>& tensor, const char* name, double otherwise) {
  if (!tensor.has_value()) return otherwise;
  if (tensor->dim() != 1) check(*tensor, name, {}, ScalarType::Float, kDevice);  // (1,) is one number, too
  if (tensor->dim() == 1) check(*tensor, name, {1}, ScalarType::Float, kDevice);
  return *static_cast<const float*>(tensor->data_ptr());
}

Tensor narrow_rows(const Tensor& matrix, int64_t first, int64_t count) {
  Tensor whole = matrix;
  return torch::stable::narrow(whole, 0, first, count);
}

void parallel_for(int64_t begin, int64_t end, int64_t grain, mla_ext::cpu::Body body, void* context) {
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) { body(first, last, context); });
}

mla_ext::cpu::Pending pending_of(const Tensor& projection, const Tensor& pending, const Tensor& count) {
  check_rows(pending, count, projection.size(0), projection.scalar_type(), kDevice);
  int64_t* waiting = static_cast<int64_t*>(count.data_ptr());
  STD_TORCH_CHECK(*waiting >= 0 && *waiting < pending.size(0), "count: out of range");
  return {pending.data_ptr(), pending.size(0), waiting};
}

// projected = [G P; h B].
void project(const Tensor& grad, const Tensor& projection, const void* h, const mla_ext::cpu::Pending& pending,
             Tensor& projected) {
  const mla_ext::cpu::Kernels& kernels = mla_ext::cpu::kernels();
  const DType accumulate = dtype_of(projection, "projection");
  const Tensor G = torch::stable::to(grad, projection.scalar_type());
  const int64_t C = G.size(0), s = G.size(1);
  Tensor Z = narrow_rows(projected, 0, C), k = narrow_rows(projected, C, 1);
  matmul_into(G, projection, Z);
  // Not by BLAS: the user may have allowed it to round as P h must not be.
  kernels.project(accumulate, projection.data_ptr(), nullptr, 0, h, s, k.data_ptr(), parallel_for);
  if (pending.rows != nullptr) kernels.correct(accumulate, G.data_ptr(), Z.data_ptr(), C, s, pending, parallel_for);
}

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
  mla_ext::cpu::kernels().rls_update(
      dtype_of(projection, "projection"),
      {projection.data_ptr(), feature_mean.data_ptr(), projection.size(0), alpha, forget, normalize}, parallel_for);
}

void head_step_(Tensor weight, const Tensor& grad, std::optional<Tensor> momentum_buffer, std::optional<Tensor> base,
                std::optional<Tensor> beta, std::optional<Tensor> rows, std::optional<Tensor> count,
                const std::optional<Tensor>& feature_mean, Tensor step, double lr, double momentum, double dampening,
                double weight_decay, bool nesterov, bool maximize, double alpha, double forget, bool absorb_before,
                bool normalize, const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                const std::optional<Tensor>& lr_tensor, const std::optional<Tensor>& alpha_tensor) {
  STD_TORCH_CHECK(base.has_value() && !beta.has_value(), "base: expected a (s, s) tensor and no beta");
  Tensor projection = *base;
  check_head_step(weight, grad, momentum_buffer, projection, feature_mean, step, kDevice);
  const DType dtype = dtype_of(weight, "weight");
  const double scale = scalar(grad_scale, "grad_scale", 1);
  STD_TORCH_CHECK(rows.has_value() == count.has_value(), "count: expected beside rows");
  mla_ext::cpu::Pending pending{nullptr, 0, nullptr};
  if (rows.has_value()) {
    pending = pending_of(projection, *rows, *count);
    STD_TORCH_CHECK(forget == 0 && !normalize, "rows: expected neither forget nor normalize with them");
  }
  if (scalar(found_inf, "found_inf", 0) != 0) return;

  const int64_t C = weight.size(0), s = weight.size(1);
  const mla_ext::cpu::RlsUpdate rls{
      projection.data_ptr(), pointer(feature_mean), s, scalar(alpha_tensor, "alpha_tensor", alpha), forget, normalize};
  Tensor projected = torch::stable::new_empty(projection, {C + 1, s});
  float* steps = static_cast<float*>(step.data_ptr());
  mla_ext::cpu::HeadStep arguments{rls,
                                   C,
                                   weight.data_ptr(),
                                   grad.data_ptr(),
                                   pointer(momentum_buffer),
                                   projected.data_ptr(),
                                   /*is_projected=*/false,
                                   pending,
                                   /*is_first=*/*steps == 0,
                                   absorb_before,
                                   nesterov,
                                   maximize,
                                   scale,
                                   scalar(lr_tensor, "lr_tensor", lr),
                                   momentum,
                                   dampening,
                                   weight_decay};
  if (mla_ext::cpu::blas_is_faster(C, s)) {
    if (absorb_before && feature_mean.has_value()) {
      const DType accumulate = dtype_of(projection, "projection");
      if (pending.rows != nullptr) {
        mla_ext::cpu::kernels().fold(accumulate, projection.data_ptr(), s, pending, parallel_for);
      }
      mla_ext::cpu::kernels().rls_update(accumulate, rls, parallel_for);
      arguments.rls.feature_mean = nullptr;
    }
    project(grad, projection, arguments.rls.feature_mean, pending, projected);
    arguments.is_projected = true;
  }
  mla_ext::cpu::kernels().head_step(dtype, arguments, parallel_for);
  *steps += 1;
}

void settle_(std::optional<Tensor> base, std::optional<Tensor> beta, Tensor rows, Tensor count) {
  STD_TORCH_CHECK(base.has_value() && !beta.has_value(), "base: expected a (s, s) tensor and no beta");
  STD_TORCH_CHECK(base->dim() == 2 && base->numel() > 0, "base: expected a non-empty (s, s) tensor");
  check(*base, "base", {base->size(0), base->size(0)}, accumulate_type(*base), kDevice);
  mla_ext::cpu::kernels().fold(dtype_of(*base, "base"), base->data_ptr(), base->size(0), pending_of(*base, rows, count),
                               parallel_for);
}

std::tuple<Tensor, Tensor> entropy_fusion(const Tensor& logits, const std::optional<Tensor>& present) {
  check_fusion(logits, present, kDevice);
  const DType dtype = dtype_of(logits, "logits");
  const int64_t M = logits.size(0), N = logits.size(1), C = logits.size(2);
  Tensor fused = torch::stable::new_empty(logits, {N, C});
  Tensor weights = torch::stable::new_empty(logits, {M, N}, accumulate_type(logits));
  mla_ext::cpu::kernels().entropy_fusion(
      dtype,
      {logits.data_ptr(), static_cast<const bool*>(pointer(present)), fused.data_ptr(), weights.data_ptr(), M, N, C},
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
      "Tensor? alpha_tensor=None) -> ()");
  library.def("settle_(Tensor(a!)? base, Tensor(b!)? beta, Tensor(c!) rows, Tensor(d!) count) -> ()");
  library.def("entropy_fusion(Tensor logits, Tensor? present) -> (Tensor fused, Tensor weights)");
}

STABLE_TORCH_LIBRARY_IMPL(mla_ext, CPU, library) {
  library.impl("feature_mean", TORCH_BOX(&feature_mean));
  library.impl("rls_update_", TORCH_BOX(&rls_update_));
  library.impl("head_step_", TORCH_BOX(&head_step_));
  library.impl("settle_", TORCH_BOX(&settle_));
  library.impl("entropy_fusion", TORCH_BOX(&entropy_fusion));
}
