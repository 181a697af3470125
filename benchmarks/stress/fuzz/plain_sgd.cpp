// The step of parameters without a projection: the same bits as the formula with every rounding written out.
#include "cpu/plain_sgd.h"

#include <vector>

#include "compare.h"
#include "cpu.h"

namespace fuzz {
namespace {

using mla_ext::cpu::PlainSgd;
using mla_ext::cpu::SgdTensor;

struct Parameter {
  DType dtype;
  Array weight, grad, momentum_buffer;
};

/// a b + c, rounded once or twice; `volatile` keeps the compiler from making the two one.
template <class A>
A multiply_add(bool once, A a, A b, A c) {
  if (once) return std::fma(a, b, c);
  const volatile A product = a * b;
  return product + c;
}

template <class A>
void check_parameter(const PlainSgd& step, const Parameter& before, const Parameter& now) {
  const auto same = [](const char* what, const Array& array, int64_t i, A expected) {
    const A got = A(array.get(i));
    ++tally.compared;
    if (got != expected && !(std::isnan(got) && std::isnan(expected))) fail(what, i, got, {expected, 0});
  };
  const A undamped = A(1 - step.dampening);
  for (int64_t i = 0; i < now.weight.count(); ++i) {
    const A w = A(before.weight.get(i)), grad = A(before.grad.get(i)) / A(step.grad_scale);
    same("grad", now.grad, i, grad);
    A d = step.maximize ? -grad : grad;
    if (step.weight_decay != 0) d = multiply_add(step.fma, w, A(step.weight_decay), d);
    if (now.momentum_buffer.is_present()) {
      const volatile A kept = A(before.momentum_buffer.get(i)) * A(step.momentum);
      const A b = step.first_step ? d : multiply_add<A>(step.fma, d, undamped, kept);
      same("momentum_buffer", now.momentum_buffer, i, b);
      d = step.nesterov ? multiply_add(step.fma, b, A(step.momentum), d) : b;
    }
    same("weight", now.weight, i, multiply_add(step.fma, d, A(-step.lr), w));
  }
}

}  // namespace

void try_plain_sgd(Input& input) {
  const bool has_momentum = input.flag();
  PlainSgd step = {};
  step.first_step = input.flag();
  step.nesterov = input.flag();
  step.maximize = input.flag();
  step.fma = input.flag();
  step.grad_scale = input.number({1, 1024, 65536});
  if (step.grad_scale == 0) step.grad_scale = 1;
  step.lr = input.number({0.1, 0, 1e3});
  step.momentum = has_momentum ? input.number({0.9, 0.5, 1}) : 0;
  step.dampening = input.number({0, 0.3, 1});
  step.weight_decay = input.number({0, 0.01, 1});
  step.count = 1 + input.below(5);
  std::vector<Parameter> parameters;
  for (int64_t t = 0; t < step.count; ++t) {
    const DType dtype = input.flag() ? DType::Float64 : DType::Float32;
    const int64_t size = input.size(5000) - 1;
    Parameter parameter{dtype, numbers(input, dtype, size), numbers(input, dtype, size), {}};
    if (has_momentum) parameter.momentum_buffer = step.first_step ? Array(dtype, size) : numbers(input, dtype, size);
    parameters.push_back(parameter);
  }
  const std::vector<Parameter> before = parameters;
  std::vector<SgdTensor> tensors;
  for (Parameter& p : parameters) {
    const int64_t size = p.weight.count();
    tensors.push_back({p.weight.data(), p.grad.data(), p.momentum_buffer.data(), step.size, size, p.dtype});
    step.size += size;
  }
  step.tensors = tensors.data();
  described =
      "plain_sgd " + words("parameters", step.count, "elements", step.size, "first", step.first_step, "nesterov",
                           step.nesterov, "maximize", step.maximize, "fma", step.fma, "scale", step.grad_scale, "lr",
                           step.lr, "momentum", step.momentum, "decay", step.weight_decay);
  plain_sgd(step);
  for (size_t t = 0; t < parameters.size(); ++t) {
    const bool is_double = parameters[t].dtype == DType::Float64;
    (is_double ? check_parameter<double> : check_parameter<float>)(step, before[t], parameters[t]);
  }
}

}  // namespace fuzz
