// The module layerprune._C: what the build was, and the random stream as NumPy arrays. It is tied
// to one version of Python and knows nothing of torch, so that it can be asked before anything is
// loaded that may not fit.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "../cpu/choice.h"
#include "../gate_math.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["layerprune"] = LAYERPRUNE_VERSION;
  info["torch"] = LAYERPRUNE_TORCH_VERSION;
  info["torch_oldest"] = LAYERPRUNE_TORCH_OLDEST;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["instruction_set"] = layerprune::runs_avx2() ? "avx2" : "baseline";
  return info;
}

py::array_t<uint32_t> philox_stream(uint64_t seed, uint64_t draw, uint32_t section,
                                    uint32_t first_row, py::ssize_t count) {
  py::array_t<uint32_t> result({count, py::ssize_t{4}});
  auto view = result.mutable_unchecked<2>();
  for (py::ssize_t i = 0; i < count; ++i) {
    const auto found =
        layerprune::row_words({seed, draw}, section, first_row + static_cast<uint32_t>(i));
    for (int w = 0; w < 4; ++w) view(i, w) = found.word[w];
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and the random stream of layerprune's compiled part.";
  m.def("build_info", &build_info);
  m.def("philox_stream", &philox_stream, py::arg("seed"), py::arg("draw"), py::arg("section"),
        py::arg("first_row"), py::arg("count"));
}
