#include "rows.h"

#include <array>
#include <vector>

#include "device.h"

namespace layerprune {

using torch::headeronly::MemoryFormat;

namespace {

// The dimensions from the innermost outwards.
std::array<int64_t, 5> dimension_order(MemoryFormat format) {
  if (format == MemoryFormat::ChannelsLast) return {1, 3, 2, 0, -1};
  if (format == MemoryFormat::ChannelsLast3d) return {1, 4, 3, 2, 0};
  return {};
}

// Whether the dimensions but the first `outer` lie densely in memory, in the order of the format.
bool dense(const Tensor& tensor, MemoryFormat format, int64_t outer) {
  if (tensor.numel() == 0) return true;
  const int64_t dim = tensor.dim();
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  const bool plain = format == MemoryFormat::Contiguous;
  const auto order = dimension_order(format);
  int64_t expected = 1;
  for (int64_t i = 0; i < dim - outer; ++i) {
    const int64_t d = plain ? dim - 1 - i : order[i];
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

}  // namespace

MemoryFormat row_format(const Tensor& tensor) {
  const int64_t dim = tensor.dim();
  if (!tensor.is_contiguous()) {
    if (dim == 4 && is_dense(tensor, MemoryFormat::ChannelsLast)) return MemoryFormat::ChannelsLast;
    if (dim == 5 && is_dense(tensor, MemoryFormat::ChannelsLast3d)) {
      return MemoryFormat::ChannelsLast3d;
    }
  }
  return MemoryFormat::Contiguous;
}

MemoryFormat memory_format(int64_t dim, bool channels_last) {
  if (!channels_last) return MemoryFormat::Contiguous;
  check(dim == 4 || dim == 5, "channels lie last in 4 or 5 dimensions, not in ", dim);
  return dim == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
}

bool is_dense(const Tensor& tensor, MemoryFormat format) { return dense(tensor, format, 0); }

Tensor with_dense_rows(const Tensor& tensor, MemoryFormat format) {
  return dense(tensor, format, 1) ? tensor : torch::stable::contiguous(tensor, format);
}

Tensor empty_rows(int64_t count, const Tensor& like, ScalarType type, MemoryFormat format) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  sizes[0] = count;
  Tensor rows =
      torch::stable::empty(sizes, type, std::nullopt, like.device(), std::nullopt, format);
  prepare(rows);
  return rows;
}

int64_t row_size(const Tensor& tensor) {
  int64_t size = 1;
  for (int64_t d = 1; d < tensor.dim(); ++d) size *= tensor.size(d);
  return size;
}

int64_t bytes(const Tensor& tensor) {
  return tensor.numel() * static_cast<int64_t>(tensor.element_size());
}

RowsIn rows_in(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.size(0)};
}
RowsOut rows_out(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), row_size(tensor), tensor.size(0)};
}

ElementType element_type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return ElementType::kFloat64;
    case ScalarType::Float:
      return ElementType::kFloat32;
    case ScalarType::Half:
      return ElementType::kFloat16;
    case ScalarType::BFloat16:
      return ElementType::kBFloat16;
    default:
      check(false, "rows must be float64, float32, float16 or bfloat16");
      return ElementType::kFloat32;
  }
}

ScalarType accumulation_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace layerprune
