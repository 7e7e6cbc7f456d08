// The types that Fathom's HDF5 files hold. Private to src/io: the reader and the writer are instantiated for
// each.
#pragma once

#include <cstdint>

/// macro(T) for each of them.
#define FATHOM_FOR_EACH_H5_ELEMENT(macro)                                                \
  macro(float) macro(double) macro(std::int32_t) macro(std::int64_t) macro(std::uint8_t) \
      macro(std::uint16_t) macro(std::uint32_t) macro(std::uint64_t)
