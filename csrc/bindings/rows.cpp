#include "rows.h"

#include <array>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

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

// Fresh memory costs a page fault for every page, often more than the operation itself: ask for
// large pages, as NumPy does for its arrays. Without effect where the system has set them
// otherwise.
void advise_large_pages(const Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes(tensor) < (int64_t{4} << 20)) return;
  constexpr uintptr_t page = 4096;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t first = (begin + page - 1) / page * page;
  madvise(reinterpret_cast<void*>(first), (begin + bytes(tensor) - first) / page * page,
          MADV_HUGEPAGE);
#endif
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

bool is_dense(const Tensor& tensor, MemoryFormat format) { return dense(tensor, format, 0); }

Tensor with_dense_rows(const Tensor& tensor, MemoryFormat format) {
  return dense(tensor, format, 1) ? tensor : torch::stable::contiguous(tensor, format);
}

Tensor empty_rows(int64_t count, const Tensor& like, ScalarType type, MemoryFormat format) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  sizes[0] = count;
  Tensor rows = torch::stable::empty(sizes, type, std::nullopt, std::nullopt, std::nullopt, format);
  advise_large_pages(rows);
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

RowsIn rows_in(const Tensor& tensor) { return {tensor.const_data_ptr(), tensor.stride(0)}; }
RowsOut rows_out(const Tensor& tensor) { return {tensor.mutable_data_ptr(), row_size(tensor)}; }

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

bool non_temporal(int64_t bytes_moved, std::initializer_list<const Tensor*> outputs) {
  // What a core finds of a usual last-level cache. The size that a system reports is of no use: on
  // a virtual machine it is often that of the whole host.
  constexpr int64_t cache = int64_t{32} << 20;
  if (bytes_moved < cache) return false;
  constexpr int64_t boundary = 32;
  for (const Tensor* output : outputs) {
    const int64_t row_bytes = row_size(*output) * static_cast<int64_t>(output->element_size());
    const auto address = reinterpret_cast<uintptr_t>(output->const_data_ptr());
    if (row_bytes % boundary != 0 || address % boundary != 0) return false;
  }
  return true;
}

}  // namespace layerprune
