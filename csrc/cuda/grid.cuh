// What a kernel shares: memory within a block, a barrier across the grid, an order with the launches beside it.
#pragma once

#include <cooperative_groups.h>

namespace mla_ext::cuda {

/// Waits until every thread of the grid is here; what they wrote before is then seen by all. Cooperative launches only.
__device__ inline void grid_barrier() { cooperative_groups::this_grid().sync(); }

#ifdef __CUDACC__
/// A chained launch (launch.h) may begin before the one before it has ended. Each of its threads calls this before it
/// touches memory: then the one before has ended, and all that it wrote is seen.
__device__ inline void wait_for_previous_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// A chained launch after this one may begin once every block has called this: it then waits on the device already.
__device__ inline void let_next_launch_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/// The block's dynamic shared memory, 16-byte aligned.
__device__ inline unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}
#else
void wait_for_previous_launch();
inline void let_next_launch_begin() {}
unsigned char* dynamic_shared_memory();  // of whoever runs the kernels on the host
#endif

}  // namespace mla_ext::cuda
