// What a step of the shared head is given, drawn at random; and what torch.optim.SGD makes of a projected gradient.
#pragma once

#include "compare.h"

namespace fuzz {

struct Head {
  DType dtype, accumulate;
  int64_t C, s;
  bool absorbs, has_momentum, first_step;
  Hyperparameters hyper;
  bool scalars_from_memory;
  float lr = 0, alpha = 0, found_inf = 0, grad_scale, steps;
  Array weight, grad, momentum_buffer, feature_mean;

  Head(Input& input, int64_t largest, int64_t no_classes)
      : dtype(any_dtype(input)),
        accumulate(accumulate_type(dtype)),
        C(input.size(largest / 3) - 1 + (no_classes > 0)),
        s(input.size(largest)),
        absorbs(input.below(8) != 0),
        has_momentum(input.flag()),
        first_step(input.flag()) {
    precision = format_of(accumulate).precision();
    hyper.alpha = input.number({0.1, 1e-6, 1e-30, 1e6});
    hyper.forget = input.number({0, 1e-3, 1});
    hyper.normalize = input.flag();
    hyper.absorb_before = input.flag();
    hyper.nesterov = input.flag();
    hyper.maximize = input.flag();
    hyper.lr = input.number({0.1, 0, 1e3});
    hyper.momentum = has_momentum ? input.number({0.9, 0.5, 1}) : 0;
    hyper.dampening = input.number({0, 0.3, 1});
    hyper.weight_decay = input.number({0, 0.01, 1});
    grad_scale = static_cast<float>(input.number({1, 1024, 65536}));
    if (grad_scale == 0) grad_scale = 1;
    scalars_from_memory = input.flag();
    if (scalars_from_memory) {
      found_inf = input.below(4) == 0;
      hyper.lr = lr = static_cast<float>(hyper.lr);
      hyper.alpha = alpha = static_cast<float>(hyper.alpha);
    }
    weight = numbers(input, dtype, C * s);
    grad = numbers(input, dtype, C * s);
    if (has_momentum) momentum_buffer = first_step ? Array(accumulate, C * s) : numbers(input, accumulate, C * s);
    if (absorbs) feature_mean = numbers(input, accumulate, s);
    steps = first_step ? 0 : 3;
  }

  HeadStep step(const mla_ext::Projection& P) {
    HeadStep step{
        dtype,  C,     s,           weight.data(), grad.data(), momentum_buffer.data(), P, feature_mean.data(),
        &steps, hyper, &grad_scale, nullptr};
    if (scalars_from_memory) {
      step.hyper.lr_tensor = &lr;
      step.hyper.alpha_tensor = &alpha;
      step.found_inf = &found_inf;
    }
    return step;
  }

  std::string words() const {
    return fuzz::words("C", C, "s", s, "dtype", int(dtype), "absorbs", absorbs, "before", hyper.absorb_before, "first",
                       first_step, "normalize", hyper.normalize, "found_inf", found_inf, "alpha", hyper.alpha, "forget",
                       hyper.forget, "lr", hyper.lr, "momentum", hyper.momentum);
  }

  /// What no step changes, and what an overflow leaves as it was. True: there was no overflow.
  bool check_unchanged(const Head& before) const {
    check_same_bits("grad", grad, before.grad);
    check_same_bits("feature_mean", feature_mean, before.feature_mean);
    if (steps != before.steps + (found_inf != 0 ? 0 : 1)) fail("step", 0, steps, {});
    if (found_inf == 0) return true;
    check_same_bits("weight after an overflow", weight, before.weight);
    check_same_bits("momentum_buffer after an overflow", momentum_buffer, before.momentum_buffer);
    return false;
  }

  /// Compares the elements of row c with the step along the projected gradient z(j), without its scale and sign.
  template <class F>
  void check_row(const Head& before, int64_t c, const F& projected) const {
    const Bounded rate = constant(hyper.lr), mu = constant(hyper.momentum), decay = constant(hyper.weight_decay);
    const Bounded undamped = constant(1 - hyper.dampening), scale{grad_scale, 0};
    for (int64_t j = 0; j < s; ++j) {
      const int64_t at = c * s + j;
      Bounded z = projected(j) / scale;
      if (hyper.maximize) z = -z;
      const Bounded w{before.weight.get(at), 0}, g = z + decay * w;
      Bounded v = g;
      if (has_momentum) {
        const Bounded old{first_step ? 0 : before.momentum_buffer.get(at), 0};
        const Bounded b = first_step ? g : mu * old + undamped * g;
        check("momentum_buffer", momentum_buffer, at, b, accumulate);
        v = hyper.nesterov ? g + mu * b : b;
      }
      check("weight", weight, at, w - rate * v, dtype);
    }
  }
};

}  // namespace fuzz
