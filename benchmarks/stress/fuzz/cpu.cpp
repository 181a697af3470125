// The CPU kernels of every instruction set that this machine runs, their work cut into pieces for up to three threads.
#include "cpu.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "input.h"

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

const bool takes_strides = false, takes_any_product = false;
const int64_t largest_size = 300, no_classes = 1, variants = 4;
const std::vector<Target> targets = {try_feature_mean, try_rls_update, try_entropy_fusion, try_head_step,
                                     try_rank_step,    try_compress,   try_eigen,          try_plain_sgd};

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
  kernels->feature_mean(dtype, features, mean, N, s, parallel_for);
}

void rls_update(DType accumulate, void* base, const void* feature_mean, int64_t s, const Hyperparameters& hyper) {
  kernels->rls_update(accumulate, base, feature_mean, s, hyper, parallel_for);
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

void head_step(const HeadStep& step, const void* projected_grad) {
  const Hyperparameters& hyper = step.hyper;
  const size_t row = size_t(step.s) * mla_ext::accumulate_bytes(step.dtype);
  std::vector<unsigned char> projected(size_t(step.C + 1) * row, 0xff);
  Given given{projected_grad, projected.data(), size_t(step.C) * row};
  const cpu::Workspace workspace{projected.data(), projected_grad == nullptr ? nullptr : Given::copy, &given};

  // The update of P at once, or deferred and then made: both must end alike.
  const bool may_defer = hyper.forget == 0 && !hyper.normalize && !(hyper.absorb_before && projected_grad != nullptr);
  const int64_t capacity = may_defer ? int64_t(generator() % 4) : 0;
  if (capacity == 0) return kernels->head_step(step, workspace, parallel_for);
  std::vector<unsigned char> rows(size_t(capacity) * row, 0xff);
  int64_t count = 0;
  HeadStep deferred = step;
  deferred.projection.rows = rows.data();
  deferred.projection.count = &count;
  deferred.projection.capacity = capacity;
  kernels->head_step(deferred, workspace, parallel_for);
  settle(accumulate_type(step.dtype), deferred.projection, step.s);
}

void rank_step(const HeadStep& step) { kernels->head_step(step, {}, parallel_for); }

void settle(DType accumulate, const mla_ext::Projection& P, int64_t s) {
  kernels->settle(accumulate, P, s, parallel_for);
}

void plain_sgd(const cpu::PlainSgd& step) { kernels->plain_sgd(step, parallel_for); }

void entropy_fusion(DType dtype, const EntropyFusion& f) {
  kernels->entropy_fusion(dtype, {f.logits, f.present, f.fused, f.weights, f.M, f.N, f.C, f.temperatures, f.equal},
                          parallel_for);
}

}  // namespace fuzz
