// Errors at the boundary. The public Python functions have checked their arguments before; what is
// checked here keeps a direct call of an operator from reading or writing where it must not.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace layerprune {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A message for the user, without the place in the source.
template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << "layerprune: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << ']';
  return text.str();
}

// The tensor, contiguous, if dtype and shape are as they must be.
inline Tensor checked(const char* name, const Tensor& tensor, ScalarType type,
                      std::initializer_list<int64_t> shape) {
  bool same = tensor.scalar_type() == type && tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (const int64_t size : shape) same = same && tensor.size(d++) == size;
  check(same, name, " of shape ", shape_of(tensor), " has a wrong dtype or shape");
  check(tensor.is_cpu(), name, " is not on the CPU");
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline std::optional<Tensor> checked(const char* name, const std::optional<Tensor>& tensor,
                                     ScalarType type, std::initializer_list<int64_t> shape) {
  if (!tensor) return std::nullopt;
  return checked(name, *tensor, type, shape);
}

// Pointers to the data of a tensor whose dtype was checked.
template <typename T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
const T* read(const std::optional<Tensor>& tensor) {
  return tensor ? read<T>(*tensor) : nullptr;
}
template <typename T>
T* write(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace layerprune
