// Choice of a kernel's instance: calls `call` with a value of the element type, with the form as a
// constant, or with whether rows are aligned as one.
#pragma once

#include <type_traits>

#include "elements.cuh"

namespace layerprune {
namespace cuda {

template <typename Call>
cudaError_t by_type(ElementType type, Call call) {
  switch (type) {
    case ElementType::kFloat64:
      return call(double{});
    case ElementType::kFloat32:
      return call(float{});
    case ElementType::kFloat16:
      return call(Half{});
    case ElementType::kBFloat16:
      return call(BFloat16{});
  }
  return cudaErrorInvalidValue;
}

template <typename Call>
cudaError_t by_form(SumForm form, Call call) {
  switch (form) {
    case SumForm::kAdd:
      return call(std::integral_constant<SumForm, SumForm::kAdd>{});
    case SumForm::kAddRelu:
      return call(std::integral_constant<SumForm, SumForm::kAddRelu>{});
    case SumForm::kLerp:
      return call(std::integral_constant<SumForm, SumForm::kLerp>{});
  }
  return cudaErrorInvalidValue;
}

template <typename Call>
cudaError_t by_alignment(bool aligned, Call call) {
  return aligned ? call(std::true_type{}) : call(std::false_type{});
}

}  // namespace cuda
}  // namespace layerprune
