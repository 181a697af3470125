// What a kernel shares: memory within a block, a barrier across the grid.
#pragma once

#include <cooperative_groups.h>

namespace mla_ext::cuda {

/// Waits until every thread of the grid is here; what they wrote before is then seen by all. Cooperative launches only.
__device__ inline void grid_barrier() { cooperative_groups::this_grid().sync(); }

#ifdef __CUDACC__
/// The block's dynamic shared memory, 16-byte aligned.
__device__ inline unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}
#else
unsigned char* dynamic_shared_memory();  // of whoever runs the kernels on the host
#endif

}  // namespace mla_ext::cuda
