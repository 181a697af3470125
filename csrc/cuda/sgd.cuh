// torch.optim.SGD for one element, eq. 6: momentum, weight decay and the step, after the projection.
#pragma once

#include "arguments.h"
#include "numeric.cuh"

namespace mla_ext::cuda {

template <typename T>
struct Sgd {
  using A = accumulate_t<T>;

  T* weight;
  A* momentum_buffer;
  A lr, momentum, undamped, weight_decay, grad_scale;
  bool nesterov, maximize, first_step;

  __device__ Sgd(T* weight, A* momentum_buffer, const Hyperparameters& hyper, const float* grad_scale, bool first_step)
      : weight(weight),
        momentum_buffer(momentum_buffer),
        lr(static_cast<A>(hyper.lr_tensor ? *hyper.lr_tensor : hyper.lr)),
        momentum(static_cast<A>(hyper.momentum)),
        undamped(static_cast<A>(1.0 - hyper.dampening)),
        weight_decay(static_cast<A>(hyper.weight_decay)),
        grad_scale(grad_scale ? static_cast<A>(*grad_scale) : A(1)),
        nesterov(hyper.nesterov),
        maximize(hyper.maximize),
        first_step(first_step) {}

  /// Steps the element at `index` with z, the projected gradient.
  __device__ void step(int64_t index, A z) const {
    A g = z / grad_scale;
    if (maximize) g = -g;
    const A w = to_accumulate(weight[index]);
    g += weight_decay * w;
    if (momentum_buffer) {
      // The first buffer is the gradient itself; what is in memory then may be anything.
      const A b = first_step ? g : momentum * momentum_buffer[index] + undamped * g;
      momentum_buffer[index] = b;
      g = nesterov ? g + momentum * b : b;
    }
    const T stepped = from_accumulate<T>(w - lr * g);
    weight[index] = stepped;
  }
};

}  // namespace mla_ext::cuda
