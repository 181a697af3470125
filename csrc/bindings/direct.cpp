// step(plain, heads, fma): all that an optimizer's step does on a CPU, at once. feature_mean(features, mean): what its
// hook does.
//
// Plain functions rather than ops: the dispatcher takes 100 ns for each tensor, DLPack's exchange, which PyTorch offers
// since 2.10, a tenth of it. Both change nothing where they are given what they do not know.
#include "bindings/direct.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <initializer_list>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "bindings/dlpack.h"
#include "cpu/isa.h"
#include "cpu/plain_sgd.h"

namespace {

namespace dlpack = mla_ext::bindings::dlpack;
using mla_ext::accumulate_bytes;
using mla_ext::DType;
using mla_ext::HeadStep;
using mla_ext::Hyperparameters;
using mla_ext::cpu::PlainSgd;
using mla_ext::cpu::SgdTensor;

constexpr char kStepDoc[] =
    "step(plain, heads, fma) -> bool\n\n"
    "Makes the steps of a list of PlainSteps and of a list of HeadSteps. Returns False, and has changed nothing, where "
    "a tensor is not a dense one in CPU memory or does not fit the others, a number is not one of Python's that "
    "float32 "
    "holds, or threads would step tensors that share memory.";
constexpr char kFeatureMeanDoc[] =
    "feature_mean(features, mean) -> int\n\n"
    "Writes the mean of features (N, s) into mean (s,) and returns N. Returns 0, and has changed nothing, where one of "
    "them is not a dense tensor in CPU memory or they do not fit.";

void parallel_for(int64_t begin, int64_t end, int64_t grain, mla_ext::cpu::Body body, void* context) {
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) { body(first, last, context); });
}

// What PyTorch is asked with, looked up once.
struct PyTorch {
  PyObject* tensor_type = nullptr;
  PyObject* parameter_type = nullptr;
  dlpack::View view = nullptr;  // null: this PyTorch does not offer it
} pytorch;

// The names of the attributes that are read, as Python's strings.
// clang-format off
#define MLA_EXT_NAMES(X)                                                                            \
  X(params) X(grads) X(momentum_buffers) X(first_step) X(grad_scale) X(hyper)                       \
  X(lr) X(momentum) X(dampening) X(weight_decay) X(nesterov) X(maximize)                            \
  X(alpha) X(absorb) X(normalize) X(forget)                                                         \
  X(weight) X(grad) X(momentum_buffer) X(projection) X(base) X(beta) X(rows) X(count) X(nu)         \
  X(feature_mean) X(step) X(found_inf) X(is_neg)
// clang-format on
struct Names {
#define MLA_EXT_DECLARE(name) PyObject* name = nullptr;
  MLA_EXT_NAMES(MLA_EXT_DECLARE)
} names;

// The attribute of an object that keeps it, a field or a slot and no property; null where there is none.
PyObject* attribute(PyObject* object, PyObject* name) {
  PyObject* value = PyObject_GetAttr(object, name);
  if (value == nullptr) PyErr_Clear();
  Py_XDECREF(value);
  return value;
}

// A dense tensor in CPU memory.
struct Dense {
  dlpack::Tensor view;
  int64_t size;

  void* data() const { return static_cast<char*>(view.data) + view.byte_offset; }
  bool has_type(uint8_t code, uint8_t bits) const { return view.type_code == code && view.type_bits == bits; }
  bool has_dtype(DType dtype) const {
    if (dtype == DType::BFloat16) return has_type(dlpack::kBfloat, 16);
    return has_type(dlpack::kFloat, dtype == DType::Float64 ? 64 : dtype == DType::Float32 ? 32 : 16);
  }
  bool has_shape(std::initializer_list<int64_t> shape) const {
    return view.ndim == int(shape.size()) && std::equal(shape.begin(), shape.end(), view.shape);
  }
};

// Whether `object` is such a tensor. Subclasses may be anything; so may one whose numbers are not those in its memory:
// of opposite sign (`is_neg`), or zeros that are nowhere.
bool get(PyObject* object, Dense& tensor) {
  if (object == nullptr) return false;
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != pytorch.tensor_type && type != pytorch.parameter_type) return false;
  dlpack::Tensor& view = tensor.view;
  if (pytorch.view(object, &view) != 0) {
    PyErr_Clear();  // sparse, for example
    return false;
  }
  if (view.device_type != dlpack::kCpu || view.type_lanes != 1) return false;
  bool is_contiguous = true;
  tensor.size = 1;
  for (int dim = view.ndim - 1; dim >= 0; --dim) {
    is_contiguous = is_contiguous && (view.shape[dim] == 1 || view.strides[dim] == tensor.size);
    tensor.size *= view.shape[dim];
  }
  if (tensor.size > 0 && (!is_contiguous || view.data == nullptr)) return false;
  PyObject* is_neg = PyObject_CallMethodNoArgs(object, names.is_neg);
  if (is_neg == nullptr) PyErr_Clear();
  Py_XDECREF(is_neg);
  return is_neg == Py_False;
}

bool get_dtype(const Dense& tensor, DType& dtype) {
  for (DType candidate : {DType::Float32, DType::Float64, DType::BFloat16, DType::Float16}) {
    dtype = candidate;
    if (tensor.has_dtype(candidate)) return true;
  }
  return false;
}

DType accumulate(DType dtype) { return dtype == DType::Float64 ? dtype : DType::Float32; }

// The memory of `object`, a tensor of this dtype and shape.
template <class T>
bool get_memory(PyObject* object, DType dtype, std::initializer_list<int64_t> shape, T*& memory) {
  Dense tensor;
  if (!get(object, tensor) || !tensor.has_dtype(dtype) || !tensor.has_shape(shape)) return false;
  memory = static_cast<T*>(tensor.data());
  return true;
}

// The same, or null for None.
template <class T>
bool get_optional(PyObject* object, DType dtype, std::initializer_list<int64_t> shape, T*& memory) {
  memory = nullptr;
  return object == Py_None || get_memory(object, dtype, shape, memory);
}

// One float32, of shape () or (1,), or null for None.
bool get_scalar(PyObject* object, const float*& memory) {
  return get_optional(object, DType::Float32, {}, memory) || get_memory(object, DType::Float32, {1}, memory);
}

// PyTorch raises an error for a number that is finite, but not as a float32.
bool get_number(PyObject* object, double& number) {
  if (object == nullptr || !(PyFloat_Check(object) || PyLong_Check(object))) return false;
  number = PyFloat_AsDouble(object);
  if (number == -1 && PyErr_Occurred() != nullptr) {
    PyErr_Clear();  // an integer beyond all doubles
    return false;
  }
  return std::abs(number) <= std::numeric_limits<float>::max() || !std::isfinite(number);
}

bool get_flag(PyObject* object, bool& flag) {
  flag = object == Py_True;
  return flag || object == Py_False;
}

bool get_hyper(PyObject* hyper, Hyperparameters& out) {
  if (hyper == nullptr) return false;
  const std::pair<PyObject*, double*> numbers[] = {
      {names.lr, &out.lr},       {names.momentum, &out.momentum}, {names.dampening, &out.dampening},
      {names.alpha, &out.alpha}, {names.forget, &out.forget},     {names.weight_decay, &out.weight_decay}};
  for (const auto& [name, number] : numbers) {
    if (!get_number(attribute(hyper, name), *number)) return false;
  }
  const std::pair<PyObject*, bool*> flags[] = {
      {names.nesterov, &out.nesterov}, {names.maximize, &out.maximize}, {names.normalize, &out.normalize}};
  for (const auto& [name, flag] : flags) {
    if (!get_flag(attribute(hyper, name), *flag)) return false;
  }
  PyObject* absorb = attribute(hyper, names.absorb);
  if (absorb == nullptr || !PyUnicode_Check(absorb)) return false;
  out.absorb_before = PyUnicode_CompareWithASCIIString(absorb, "before") == 0;
  return true;
}

// The step of one group's plain parameters, with the memory of its list.
struct Plain {
  PlainSgd step{};
  std::vector<SgdTensor> tensors;
};

// The step of one head, with its workspace.
struct Head {
  HeadStep step{};
  std::unique_ptr<char[]> projected;
};

// Whether no two tensors share memory: threads step several at once.
bool are_disjoint(const std::vector<SgdTensor>& tensors) {
  std::vector<std::pair<const char*, const char*>> ranges;
  for (const SgdTensor& tensor : tensors) {
    const int64_t bytes = tensor.size * int64_t(accumulate_bytes(tensor.dtype));
    for (void* start : {tensor.weight, tensor.grad, tensor.momentum_buffer}) {
      if (start != nullptr) ranges.emplace_back(static_cast<char*>(start), static_cast<char*>(start) + bytes);
    }
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].first < ranges[i - 1].second) return false;
  }
  return true;
}

// The memory of the tensor at `index` of a list, which is to have the dtype and shape of `param`.
bool get_like(const Dense& param, PyObject* list, Py_ssize_t index, void*& memory) {
  Dense tensor;
  if (!get(PyList_GET_ITEM(list, index), tensor) || !tensor.has_type(param.view.type_code, param.view.type_bits)) {
    return false;
  }
  memory = tensor.data();
  return tensor.view.ndim == param.view.ndim &&
         std::equal(param.view.shape, param.view.shape + param.view.ndim, tensor.view.shape);
}

bool get_plain(PyObject* object, bool fma, Plain& plain) {
  PyObject* params = attribute(object, names.params);
  PyObject* grads = attribute(object, names.grads);
  PyObject* buffers = attribute(object, names.momentum_buffers);
  for (PyObject* list : {params, grads, buffers}) {
    if (list == nullptr || !PyList_Check(list)) return false;
  }
  const Py_ssize_t count = PyList_GET_SIZE(params);
  Hyperparameters hyper;
  PlainSgd& step = plain.step;
  if (PyList_GET_SIZE(grads) != count || !get_hyper(attribute(object, names.hyper), hyper) ||
      !get_flag(attribute(object, names.first_step), step.first_step) ||
      !get_number(attribute(object, names.grad_scale), step.grad_scale)) {
    return false;
  }
  const bool has_momentum = hyper.momentum != 0;
  if (PyList_GET_SIZE(buffers) != (has_momentum ? count : 0)) return false;
  plain.tensors.reserve(count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    Dense param;
    SgdTensor tensor{};
    if (!get(PyList_GET_ITEM(params, i), param) || !get_dtype(param, tensor.dtype)) return false;
    if (tensor.dtype != accumulate(tensor.dtype)) return false;  // PyTorch rounds half precision in its own way
    if (!get_like(param, grads, i, tensor.grad)) return false;
    if (has_momentum && !get_like(param, buffers, i, tensor.momentum_buffer)) return false;
    tensor.weight = param.data();
    tensor.begin = step.size;
    tensor.size = param.size;
    step.size += tensor.size;
    plain.tensors.push_back(tensor);
  }
  step.tensors = plain.tensors.data();
  step.count = count;
  step.fma = fma;
  step.lr = hyper.lr;
  step.momentum = hyper.momentum;
  step.dampening = hyper.dampening;
  step.weight_decay = hyper.weight_decay;
  step.nesterov = hyper.nesterov;
  step.maximize = hyper.maximize;
  return step.size <= mla_ext::cpu::kElementsOfOneThread || are_disjoint(plain.tensors);
}

bool get_projection(PyObject* object, const HeadStep& step, mla_ext::Projection& P) {
  const DType A = accumulate(step.dtype);
  if (object == nullptr || !get_optional(attribute(object, names.base), A, {step.s, step.s}, P.base) ||
      !get_optional(attribute(object, names.beta), A, {}, P.beta) ||
      !get_optional(attribute(object, names.nu), A, {}, P.nu) || (P.base == nullptr) == (P.beta == nullptr)) {
    return false;
  }
  PyObject* rows = attribute(object, names.rows);
  if (rows == Py_None) return P.base != nullptr;
  Dense K, count;
  if (!get(rows, K) || !K.has_dtype(A) || K.view.ndim != 2 || !get(attribute(object, names.count), count) ||
      !count.has_type(dlpack::kInt, 64) || !count.has_shape({})) {
    return false;
  }
  P.rows = K.data();
  P.capacity = K.view.shape[0];
  P.count = static_cast<int64_t*>(count.data());
  return K.has_shape({P.capacity, step.s}) && *P.count >= 0 && *P.count < P.capacity && !step.hyper.normalize &&
         (step.hyper.forget == 0 || P.base == nullptr);
}

bool get_head(PyObject* object, Head& head) {
  HeadStep& step = head.step;
  Dense weight;
  if (!get(attribute(object, names.weight), weight) || !get_dtype(weight, step.dtype) || weight.view.ndim != 2 ||
      weight.size == 0) {
    return false;
  }
  step.C = weight.view.shape[0];
  step.s = weight.view.shape[1];
  step.weight = weight.data();
  const DType A = accumulate(step.dtype);
  if (!get_hyper(attribute(object, names.hyper), step.hyper) ||
      !get_projection(attribute(object, names.projection), step, step.projection) ||
      !get_memory(attribute(object, names.grad), step.dtype, {step.C, step.s}, step.grad) ||
      !get_optional(attribute(object, names.momentum_buffer), A, {step.C, step.s}, step.momentum_buffer) ||
      !get_optional(attribute(object, names.feature_mean), A, {step.s}, step.feature_mean) ||
      !get_memory(attribute(object, names.step), DType::Float32, {}, step.step) ||
      !get_scalar(attribute(object, names.grad_scale), step.grad_scale) ||
      !get_scalar(attribute(object, names.found_inf), step.found_inf)) {
    return false;
  }
  if (step.momentum_buffer == nullptr && step.hyper.momentum != 0) return false;
  if (step.projection.base != nullptr) {
    if (mla_ext::cpu::blas_is_faster(step.C, step.s)) return false;  // the op has one
    head.projected.reset(new char[(step.C + 1) * step.s * accumulate_bytes(step.dtype)]);
  }
  return true;
}

// Lets other Python threads run, for as long as it lives.
struct WithoutGil {
  PyThreadState* thread = PyEval_SaveThread();
  ~WithoutGil() { PyEval_RestoreThread(thread); }
};

bool is_called_with(const char* function, Py_ssize_t wanted, Py_ssize_t count) {
  if (count != wanted) PyErr_Format(PyExc_TypeError, "%s: expected %zd arguments, got %zd", function, wanted, count);
  return count == wanted;
}

PyObject* step(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!is_called_with("step", 3, count)) return nullptr;
  for (int i = 0; i < 2; ++i) {
    if (!PyList_Check(args[i])) {
      const char* name = i == 0 ? "plain" : "heads";
      return PyErr_Format(PyExc_TypeError, "%s: expected a list, got %s", name, Py_TYPE(args[i])->tp_name);
    }
  }
  if (pytorch.view == nullptr) Py_RETURN_FALSE;
  try {
    std::vector<Plain> plains(PyList_GET_SIZE(args[0]));
    std::vector<Head> heads(PyList_GET_SIZE(args[1]));
    for (size_t i = 0; i < plains.size(); ++i) {
      if (!get_plain(PyList_GET_ITEM(args[0], i), args[2] == Py_True, plains[i])) Py_RETURN_FALSE;
    }
    for (size_t i = 0; i < heads.size(); ++i) {
      if (!get_head(PyList_GET_ITEM(args[1], i), heads[i])) Py_RETURN_FALSE;
    }
    const mla_ext::cpu::Kernels& kernels = mla_ext::cpu::kernels();
    const WithoutGil without_gil;
    for (const Plain& plain : plains) kernels.plain_sgd(plain.step, parallel_for);
    for (const Head& head : heads) {
      kernels.head_step(head.step, {head.projected.get(), nullptr, nullptr}, parallel_for);
    }
  } catch (const std::exception& failure) {
    return PyErr_Format(PyExc_RuntimeError, "%s", failure.what());
  }
  Py_RETURN_TRUE;
}

PyObject* feature_mean(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!is_called_with("feature_mean", 2, count)) return nullptr;
  Dense features, mean;
  DType dtype;
  const bool fits = pytorch.view != nullptr && get(args[0], features) && get(args[1], mean) && features.size > 0 &&
                    get_dtype(features, dtype) && mean.has_dtype(accumulate(dtype)) && features.view.ndim > 0 &&
                    mean.has_shape({features.view.shape[features.view.ndim - 1]});
  if (!fits) return PyLong_FromLong(0);
  const int64_t N = features.size / mean.size;
  try {
    const mla_ext::cpu::Kernels& kernels = mla_ext::cpu::kernels();
    const WithoutGil without_gil;
    kernels.feature_mean(dtype, features.data(), mean.data(), N, mean.size, parallel_for);
  } catch (const std::exception& failure) {
    return PyErr_Format(PyExc_RuntimeError, "%s", failure.what());
  }
  return PyLong_FromLongLong(N);
}

// Where PyTorch has no such table, or one of another version, `view` stays null.
void find_view() {
  PyObject* table = PyObject_GetAttrString(pytorch.tensor_type, "__dlpack_c_exchange_api__");
  void* api = table == nullptr ? nullptr : PyCapsule_GetPointer(table, "dlpack_exchange_api");
  Py_XDECREF(table);
  PyErr_Clear();
  if (api == nullptr) return;
  const auto& exchange = *static_cast<const dlpack::ExchangeApi*>(api);
  if (exchange.major_version == dlpack::kMajorVersion) pytorch.view = exchange.view;
}

bool make_names() {
#define MLA_EXT_MAKE(name) \
  if ((names.name = PyUnicode_InternFromString(#name)) == nullptr) return false;
  MLA_EXT_NAMES(MLA_EXT_MAKE)
  return true;
}

template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)>
PyCFunction as_method() {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {{"step", as_method<step>(), METH_FASTCALL, kStepDoc},
                         {"feature_mean", as_method<feature_mean>(), METH_FASTCALL, kFeatureMeanDoc},
                         {nullptr, nullptr, 0, nullptr}};

}  // namespace

namespace mla_ext::bindings {

int add_direct(PyObject* module) {
  PyObject* torch = PyImport_ImportModule("torch");
  if (torch == nullptr) return -1;
  PyObject* nn = PyObject_GetAttrString(torch, "nn");
  pytorch.tensor_type = PyObject_GetAttrString(torch, "Tensor");
  pytorch.parameter_type = nn == nullptr ? nullptr : PyObject_GetAttrString(nn, "Parameter");
  Py_XDECREF(nn);
  Py_DECREF(torch);
  if (pytorch.tensor_type == nullptr || pytorch.parameter_type == nullptr || !make_names()) return -1;
  find_view();
  return PyModule_AddFunctions(module, methods);
}

}  // namespace mla_ext::bindings
