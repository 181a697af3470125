// torch.optim.SGD's step, with the projected gradient for the gradient.
#pragma once

#include "dtype.h"
#include "kernels.h"

namespace mla_ext::cpu::MLA_EXT_ISA {

// For the elements [begin, end) of the weight; z has theirs of G P.
template <class T, class A>
void sgd(const HeadStep& step, const A* z, int64_t begin, int64_t end) {
  const Hyperparameters& hyper = step.hyper;
  T* weight = static_cast<T*>(step.weight) + begin;
  const A lr = A(hyper.lr_tensor == nullptr ? hyper.lr : *hyper.lr_tensor);
  const A weight_decay = A(hyper.weight_decay), momentum = A(hyper.momentum), undamped = A(1 - hyper.dampening);
  const A scale = A((hyper.maximize ? -1 : 1) / (step.grad_scale == nullptr ? 1.0 : *step.grad_scale));
  const int64_t n = end - begin;
  if (step.momentum_buffer == nullptr) {
    for (int64_t i = 0; i < n; ++i) {
      const A w = widen(weight[i]);
      narrow(w - lr * (scale * z[i] + weight_decay * w), weight[i]);
    }
    return;
  }
  A* momentum_buffer = static_cast<A*>(step.momentum_buffer) + begin;
  const bool first_step = *step.step == 0, nesterov = hyper.nesterov;  // the first gradient starts the buffer
  for (int64_t i = 0; i < n; ++i) {
    const A w = widen(weight[i]);
    const A g = scale * z[i] + weight_decay * w;
    const A v = first_step ? g : momentum * momentum_buffer[i] + undamped * g;
    momentum_buffer[i] = v;
    narrow(w - lr * (nesterov ? g + momentum * v : v), weight[i]);
  }
}

}  // namespace mla_ext::cpu::MLA_EXT_ISA
