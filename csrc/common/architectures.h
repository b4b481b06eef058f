// Which of the architectures that a library was built for, as in "75;80+PTX", runs on a device.
#pragma once

namespace adamix {

// 10 * compute capability of the code that the driver takes on a device of `capability`: machine code of its major
// version, else the newest PTX it can compile; 0 where it has neither.
constexpr int running_architecture(const char* built, int capability) {
  int machine = 0, ptx = 0;
  while (*built != '\0') {
    int number = 0;
    while (*built >= '0' && *built <= '9') number = 10 * number + (*built++ - '0');
    bool with_ptx = *built == '+';
    while (*built != '\0' && *built != ';') ++built;
    if (*built == ';') ++built;
    if (number > capability) continue;
    if (number / 10 == capability / 10 && number > machine) machine = number;
    if (with_ptx && number > ptx) ptx = number;
  }
  return machine != 0 ? machine : ptx;
}

static_assert(running_architecture("75;80;90+PTX", 90) == 90);
static_assert(running_architecture("75;80;90+PTX", 86) == 80);
static_assert(running_architecture("75;80;90+PTX", 120) == 90);
static_assert(running_architecture("70+PTX;80", 90) == 70);
static_assert(running_architecture("70+PTX;80;86", 89) == 86);
static_assert(running_architecture("80;90", 75) == 0 && running_architecture("", 90) == 0);

}  // namespace adamix
