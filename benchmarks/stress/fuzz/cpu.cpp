// The CPU kernels of every instruction set that this machine runs, their work cut into pieces for up to three threads.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "backend.h"
#include "cpu/kernels.h"

namespace mla_ext::cpu {
namespace baseline {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
}  // namespace mla_ext::cpu

namespace fuzz {

namespace cpu = mla_ext::cpu;

const bool takes_scalars_from_memory = false;
const int64_t largest_size = 300, no_classes = 1, variants = 4;

namespace {

const cpu::Kernels* kernels = nullptr;
std::mt19937_64 generator;

/// Any cut into pieces must do, whatever the grain: finer ones than the kernels ask for let small inputs race.
void parallel_for(int64_t begin, int64_t end, int64_t, cpu::Body body, void* context) {
  std::vector<int64_t> cuts = {begin, end};
  for (auto more = generator() % 6; more > 0; --more) {
    cuts.push_back(begin + int64_t(generator() % uint64_t(end - begin + 1)));
  }
  std::sort(cuts.begin(), cuts.end());
  std::vector<size_t> order(cuts.size() - 1);
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), generator);
  const size_t threads = 1 + generator() % 3;
  const auto work = [&](size_t first) {
    for (size_t i = first; i < order.size(); i += threads) {
      if (cuts[order[i]] < cuts[order[i] + 1]) body(cuts[order[i]], cuts[order[i] + 1], context);
    }
  };
  std::vector<std::thread> others;
  for (size_t i = 1; i < threads; ++i) others.emplace_back(work, i);
  work(0);
  for (std::thread& other : others) other.join();
}

cpu::RlsUpdate of(const RlsUpdate& update) {
  return {update.projection, update.feature_mean, update.s, update.alpha, update.forget, update.normalize};
}

}  // namespace

void use(int64_t variant, uint64_t seed) {
  kernels = &cpu::baseline::kernels;
#ifndef MLA_EXT_BASELINE_ONLY
  if (variant == 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) kernels = &cpu::avx2::kernels;
  if (variant == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    kernels = &cpu::avx512::kernels;
  }
#endif
  generator.seed(seed);
}

void feature_mean(DType dtype, const void* features, void* mean, int64_t N, int64_t s, int64_t) {
  kernels->feature_mean(cpu::DType(dtype), features, mean, N, s, parallel_for);
}

void rls_update(DType accumulate, const RlsUpdate& update) {
  kernels->rls_update(cpu::DType(accumulate), of(update), parallel_for);
}

void head_step(DType dtype, const HeadStep& step) {
  const size_t element = dtype == DType::Float64 ? 8 : 4, size = size_t(step.C * step.rls.s) * element;
  const cpu::DType accumulate = dtype == DType::Float64 ? cpu::DType::Float64 : cpu::DType::Float32;
  std::vector<unsigned char> projected(size + size_t(step.rls.s) * element, 0xff);
  if (step.projected_grad) {
    std::memcpy(projected.data(), step.projected_grad, size);
    kernels->project(accumulate, step.rls.projection, nullptr, 0, step.rls.feature_mean, step.rls.s,
                     projected.data() + size, parallel_for);
  }
  // The update of P at once, or put off and then made: both must end alike.
  const bool may_wait =
      step.rls.forget == 0 && !step.rls.normalize && !(step.absorb_before && step.projected_grad != nullptr);
  const int64_t capacity = may_wait ? int64_t(generator() % 4) : 0;
  std::vector<unsigned char> rows(size_t(capacity * step.rls.s) * element, 0xff);
  int64_t count = 0;
  const cpu::Pending pending{capacity > 0 ? rows.data() : nullptr, capacity, &count};
  kernels->head_step(cpu::DType(dtype),
                     {of(step.rls), step.C, step.weight, step.grad, step.momentum_buffer, projected.data(),
                      step.projected_grad != nullptr, pending, *step.step == 0, step.absorb_before, step.nesterov,
                      step.maximize, step.grad_scale, step.lr, step.momentum, step.dampening, step.weight_decay},
                     parallel_for);
  if (capacity > 0) kernels->fold(accumulate, step.rls.projection, step.rls.s, pending, parallel_for);
  *step.step += 1;
}

void entropy_fusion(DType dtype, const EntropyFusion& f) {
  kernels->entropy_fusion(cpu::DType(dtype), {f.logits, f.present, f.fused, f.weights, f.M, f.N, f.C}, parallel_for);
}

}  // namespace fuzz
