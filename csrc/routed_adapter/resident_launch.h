// Which tile of resident_tile.h a launch takes, if any.
#pragma once

#include "routed_adapter/resident_tile.h"

#if defined(ADAMIX_LAUNCHERS)
#include <type_traits>

namespace adamix {

// Groups of 16 rows, chunks of 32 columns that a warp holds, and steps of 16 ranks. All zero: no such tile serves.
struct ResidentShape {
  int groups, chunks, steps;
  int warps(int cols) const { return cols / (chunks * kFragmentCols); }
};

// Long tiles read the weights seldom: 64 rows where they are many, 32 where one step of ranks is all. Short ones serve
// wide rows, and few of them, which would else leave multiprocessors idle.
template <typename T>
ResidentShape resident_shape(int64_t rows, int cols, int ranks, const Device& device) {
  constexpr int kMost = kResidentThreads / 32;
  if (kFragmentsFrom<T> == 0 || device.capability < kFragmentsFrom<T> || ranks % 4 != 0 || ranks == 0 || ranks > 64) {
    return {};
  }
  bool one_step = ranks <= kFragmentRanks;
  auto fits = [&](ResidentShape shape) {
    int part = shape.chunks * kFragmentCols;
    return cols > 0 && cols % part == 0 && cols / part <= kMost &&
           static_cast<size_t>(shape.warps(cols) * shape.groups) * 1024 + 16384 <=
               static_cast<size_t>(device.shared_bytes);
  };
  ResidentShape few{1, 8, one_step ? 1 : 4}, usual{2, 4, 1}, many{4, 2, 4};
  int64_t a_multiprocessor = rows / device.multiprocessors;
  if (a_multiprocessor < (one_step ? 32 : 16) && fits(few)) return few;
  if (one_step && fits(usual)) return usual;
  if (!one_step && fits(many)) return many;
  if (fits(few)) return few;
  return fits(many) ? many : ResidentShape{};
}

// Calls body(groups, chunks, steps), integral constants, with the numbers of a shape.
template <typename Body>
void dispatch_resident(const ResidentShape& shape, Body&& body) {
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  using Four = std::integral_constant<int, 4>;
  using Eight = std::integral_constant<int, 8>;
  if (shape.groups == 1 && shape.steps == 1) return body(One{}, Eight{}, One{});
  if (shape.groups == 1) return body(One{}, Eight{}, Four{});
  if (shape.groups == 2) return body(Two{}, Four{}, One{});
  body(Four{}, Two{}, Four{});
}

inline bool is_multiple(const void* pointer, uintptr_t of) { return reinterpret_cast<uintptr_t>(pointer) % of == 0; }

template <typename T, int Groups, typename Params>
void launch_resident(const char* name, void (*kernel)(Params), const ResidentShape& shape, int64_t rows, int cols,
                     int ranks, const Device& device, const Params& params) {
  constexpr int kRows = Groups * kFragmentRows;
  int warps = shape.warps(cols);
  launch(name, kernel,
         {dim3(static_cast<unsigned>((rows + kRows - 1) / kRows)), warps * 32,
          shared_bytes<ResidentMemory<T, Groups>>(warps, ranks)},
         device, params);
}

}  // namespace adamix
#endif

// The kernels of every shape that dispatch_resident knows.
#define ADAMIX_RESIDENT_SHAPES(ADAMIX_DO, T) \
  ADAMIX_DO(T, 1, 8, 1)                      \
  ADAMIX_DO(T, 1, 8, 4)                      \
  ADAMIX_DO(T, 2, 4, 1)                      \
  ADAMIX_DO(T, 4, 2, 4)
