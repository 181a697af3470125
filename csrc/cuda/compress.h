// The last launch of a step in the rank form: `reference.rank_compress`, where K is full.
#pragma once

#include "rank.cuh"

namespace mla_ext::cuda {

/// P = βI − KᵀK keeps its capacity / 2 strongest directions, if the step's h̄ made K full: P.gram then holds K Kᵀ of the
/// rows P.row(i), scaled as `RankUpdate` says. Writes rows, beta and count. Else nothing changes. One chained launch.
template <typename A>
cudaError_t compress(const RankForm<A>& P, const Hyperparameters& hyper, const float* found_inf, cudaStream_t stream);

}  // namespace mla_ext::cuda
