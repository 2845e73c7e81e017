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

// A tensor in a message: its dtype and shape, written only if the message is.
struct Described {
  ScalarType type;
  const int64_t* sizes;
  int64_t dim;
};

inline Described described(const Tensor& tensor) {
  return {tensor.scalar_type(), tensor.sizes().data(), tensor.dim()};
}

inline std::ostream& operator<<(std::ostream& out, const Described& tensor) {
  switch (tensor.type) {
    case ScalarType::Double:
      out << "float64";
      break;
    case ScalarType::Float:
      out << "float32";
      break;
    case ScalarType::Half:
      out << "float16";
      break;
    case ScalarType::BFloat16:
      out << "bfloat16";
      break;
    case ScalarType::Long:
      out << "int64";
      break;
    case ScalarType::Int:
      out << "int32";
      break;
    case ScalarType::Byte:
      out << "uint8";
      break;
    case ScalarType::Bool:
      out << "bool";
      break;
    default:
      out << "another dtype";
  }
  out << " of shape [";
  for (int64_t d = 0; d < tensor.dim; ++d) out << (d ? ", " : "") << tensor.sizes[d];
  return out << ']';
}

inline void check_device(const char* name, const Tensor& tensor, const Tensor& like) {
  check(tensor.device() == like.device(), name, " must be on the device of the other tensors");
}

// The tensor, contiguous, if it is on the device of `like` and dtype and shape are as they must be.
inline Tensor checked(const char* name, const Tensor& tensor, const Tensor& like, ScalarType type,
                      std::initializer_list<int64_t> shape) {
  bool same = tensor.scalar_type() == type && tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (const int64_t size : shape) same = same && tensor.size(d++) == size;
  const Described wanted{type, shape.begin(), static_cast<int64_t>(shape.size())};
  check(same, name, " must be ", wanted, ", got ", described(tensor));
  check_device(name, tensor, like);
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline std::optional<Tensor> checked(const char* name, const std::optional<Tensor>& tensor,
                                     const Tensor& like, ScalarType type,
                                     std::initializer_list<int64_t> shape) {
  if (!tensor) return std::nullopt;
  return checked(name, *tensor, like, type, shape);
}

// Where an argument lies in memory; nowhere if it is empty, or not contiguous and copied first.
struct Place {
  const char* name;
  const char* begin = nullptr;
  const char* end = nullptr;

  Place(const char* name, const Tensor& tensor) : name(name) {
    if (tensor.numel() == 0 || !tensor.is_contiguous()) return;
    begin = static_cast<const char*>(tensor.const_data_ptr());
    end = begin + tensor.numel() * static_cast<int64_t>(tensor.element_size());
  }
};

// For an argument that is written to while the other is read or written.
inline void check_apart(const Place& a, const Place& b) {
  check(a.end <= b.begin || b.end <= a.begin, a.name, " and ", b.name, " share memory");
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
