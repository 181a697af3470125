// The part of DLPack 1.3's C exchange API that is used here. PyTorch's copy of that header is not for its stable ABI.
#pragma once

#include <cstdint>

namespace mla_ext::bindings::dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr int32_t kCpu = 1;
constexpr uint8_t kInt = 0;
constexpr uint8_t kFloat = 2;
constexpr uint8_t kBfloat = 4;

struct Tensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t type_code;
  uint8_t type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

// Fills `tensor` with what the Python object holds now. Returns 0, or -1 with a Python exception set.
using View = int (*)(void* object, Tensor* tensor);

// What the capsule `torch.Tensor.__dlpack_c_exchange_api__` points to.
struct ExchangeApi {
  uint32_t major_version;
  uint32_t minor_version;
  ExchangeApi* previous;
  void (*allocate)();
  void (*from_object)();
  void (*to_object)();
  View view;  // may be null
};

}  // namespace mla_ext::bindings::dlpack
