// Compiled once for each instruction set, as kernels.cpp is, but without contraction: every rounding is written here.
#include "plain_sgd.h"

#include <algorithm>
#include <type_traits>

namespace mla_ext::cpu::MLA_EXT_ISA {

namespace {

// Splits of a tensor fall on whole cache lines of it.
constexpr int64_t kAlignment = 16;
// What is divided by the scale is still in cache when it is used.
constexpr int64_t kElementsPerBlock = 1024;

enum class Momentum { None, First, Later };

float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }

// The elements [begin, end) of one tensor. torch.add(c, a, alpha=b) is fma(a, b, c).
template <class A, bool kFma, bool kDecay, Momentum kMomentum, bool kNesterov>
void step_elements(const PlainSgd& step, const SgdTensor& tensor, int64_t begin, int64_t end) {
  A* __restrict weight = static_cast<A*>(tensor.weight);
  A* __restrict momentum_buffer = static_cast<A*>(tensor.momentum_buffer);
  const A* __restrict grad = static_cast<const A*>(tensor.grad);
  const A sign = step.maximize ? -1 : 1, minus_lr = A(-step.lr), weight_decay = A(step.weight_decay);
  const A momentum = A(step.momentum), undamped = A(1 - step.dampening);
  const auto fma = [](A a, A b, A c) { return kFma ? fused(a, b, c) : a * b + c; };
  for (int64_t i = begin; i < end; ++i) {
    A d = sign * grad[i];
    if constexpr (kDecay) d = fma(weight[i], weight_decay, d);
    if constexpr (kMomentum != Momentum::None) {
      const A b = kMomentum == Momentum::First ? d : fma(d, undamped, momentum_buffer[i] * momentum);
      momentum_buffer[i] = b;
      d = kNesterov ? fma(b, momentum, d) : b;
    }
    weight[i] = fma(d, minus_lr, weight[i]);
  }
}

// Calls f with the flag as a type.
template <class F>
void choose(bool flag, const F& f) {
  flag ? f(std::true_type{}) : f(std::false_type{});
}

template <class A>
void step_tensor(const PlainSgd& step, const SgdTensor& tensor, int64_t begin, int64_t end) {
  choose(step.fma, [&](auto fma) {
    choose(step.weight_decay != 0, [&](auto decay) {
      constexpr bool kFma = decltype(fma)::value, kDecay = decltype(decay)::value;
      if (tensor.momentum_buffer == nullptr) {
        return step_elements<A, kFma, kDecay, Momentum::None, false>(step, tensor, begin, end);
      }
      choose(step.nesterov, [&](auto nesterov) {
        constexpr bool kNesterov = decltype(nesterov)::value;
        step.first_step ? step_elements<A, kFma, kDecay, Momentum::First, kNesterov>(step, tensor, begin, end)
                        : step_elements<A, kFma, kDecay, Momentum::Later, kNesterov>(step, tensor, begin, end);
      });
    });
  });
}

template <class A>
void unscale_and_step(const PlainSgd& step, const SgdTensor& tensor, int64_t begin, int64_t end) {
  if (step.grad_scale == 1) return step_tensor<A>(step, tensor, begin, end);
  A* grad = static_cast<A*>(tensor.grad);
  const A scale = A(step.grad_scale);
  for (int64_t first = begin; first < end; first += kElementsPerBlock) {
    const int64_t last = std::min(first + kElementsPerBlock, end);
    for (int64_t i = first; i < last; ++i) grad[i] /= scale;
    step_tensor<A>(step, tensor, first, last);
  }
}

}  // namespace

void plain_sgd(const PlainSgd& step, ParallelFor parallel_for) {
  const auto body = [](int64_t begin, int64_t end, void* context) {
    const PlainSgd& step = *static_cast<const PlainSgd*>(context);
    for (int64_t t = 0; t < step.count; ++t) {
      const SgdTensor& tensor = step.tensors[t];
      const auto in_tensor = [&](int64_t element) {
        const int64_t i = element - tensor.begin;
        return i >= tensor.size ? tensor.size : std::max<int64_t>(i, 0) / kAlignment * kAlignment;
      };
      const int64_t first = in_tensor(begin), last = in_tensor(end);
      if (first >= last) continue;
      tensor.dtype == DType::Float64 ? unscale_and_step<double>(step, tensor, first, last)
                                     : unscale_and_step<float>(step, tensor, first, last);
    }
  };
  parallel_for(0, step.size, kElementsOfOneThread, body, const_cast<PlainSgd*>(&step));
}

}  // namespace mla_ext::cpu::MLA_EXT_ISA
