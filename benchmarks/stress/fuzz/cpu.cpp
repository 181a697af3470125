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
  kernels->feature_mean(mla_ext::DType(dtype), features, mean, N, s, parallel_for);
}

void rls_update(DType accumulate, const RlsUpdate& update) {
  mla_ext::Hyperparameters hyper;
  hyper.alpha = update.alpha;
  hyper.forget = update.forget;
  hyper.normalize = update.normalize;
  kernels->rls_update(mla_ext::DType(accumulate), update.projection, update.feature_mean, update.s, hyper,
                      parallel_for);
}

/// A product that is given rather than made.
struct Given {
  const void* product;
  void* out;
  size_t size;

  static void copy(void* context) {
    const Given& given = *static_cast<const Given*>(context);
    std::memcpy(given.out, given.product, given.size);
  }
};

void head_step(DType dtype, const HeadStep& step) {
  const int64_t s = step.rls.s;
  const size_t element = mla_ext::accumulate_bytes(mla_ext::DType(dtype)), row = size_t(s) * element;
  std::vector<unsigned char> projected(size_t(step.C + 1) * row, 0xff);
  Given given{step.projected_grad, projected.data(), size_t(step.C) * row};
  const cpu::Workspace workspace{projected.data(), step.projected_grad == nullptr ? nullptr : Given::copy, &given};

  // The update of P at once, or deferred and then made: both must end alike.
  const bool may_defer =
      step.rls.forget == 0 && !step.rls.normalize && !(step.absorb_before && step.projected_grad != nullptr);
  const int64_t capacity = may_defer ? int64_t(generator() % 4) : 0;
  std::vector<unsigned char> rows(size_t(capacity) * row, 0xff);
  int64_t count = 0;
  const mla_ext::Projection P{step.rls.projection, nullptr, capacity > 0 ? rows.data() : nullptr,
                              capacity > 0 ? &count : nullptr, capacity};
  mla_ext::Hyperparameters hyper;
  hyper.lr = step.lr;
  hyper.momentum = step.momentum;
  hyper.dampening = step.dampening;
  hyper.weight_decay = step.weight_decay;
  hyper.alpha = step.rls.alpha;
  hyper.forget = step.rls.forget;
  hyper.nesterov = step.nesterov;
  hyper.maximize = step.maximize;
  hyper.absorb_before = step.absorb_before;
  hyper.normalize = step.rls.normalize;
  kernels->head_step({mla_ext::DType(dtype), step.C, s, step.weight, step.grad, step.momentum_buffer, P,
                      step.rls.feature_mean, step.step, hyper, &step.grad_scale, nullptr},
                     workspace, parallel_for);
  if (capacity > 0)
    kernels->settle(dtype == DType::Float64 ? mla_ext::DType::Float64 : mla_ext::DType::Float32, P, s, parallel_for);
}

void entropy_fusion(DType dtype, const EntropyFusion& f) {
  kernels->entropy_fusion(mla_ext::DType(dtype), {f.logits, f.present, f.fused, f.weights, f.M, f.N, f.C},
                          parallel_for);
}

}  // namespace fuzz
