// Intel's AMX: 8 tile registers of up to 16 rows by 64 bytes, and instructions that multiply them.
//
// Functions of assembler, because GCC's intrinsics need a literal for each register, and do not tell the
// compiler that they read memory. JAXQUANT_TILES names a file that has them in C++, for tests.

#ifndef JAXQUANT_KERNELS_CPU_TILES_H_
#define JAXQUANT_KERNELS_CPU_TILES_H_

#if !defined(JAXQUANT_TILES)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "common.h"

namespace jaxquant {

// The operand of LDTILECFG. An unused tile has neither rows nor bytes.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, unused[14] = {};
  uint16_t bytes[16] = {};  // of each row
  uint8_t rows[16] = {};
};

}  // namespace jaxquant

#if defined(JAXQUANT_TILES)
#include JAXQUANT_TILES
#else

namespace jaxquant {

struct Tiles {
  // Whether this processor has tiles, and the system saves them for this process, which asks once.
  static bool IsSupported() {
    static const bool is_supported = HasInstructions() && IsPermitted();
    return is_supported;
  }

  // Sets all tiles to zero.
  static void Configure(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
  // Until they are configured again, the system does not save them.
  static void Release() { asm volatile("tilerelease"); }

  template <int tile>
  static void Zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
  }
  template <int tile>
  static void Load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
  }
  template <int tile>
  static void Store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
  }
  // sums += a * b: of rows of quads of signed bytes by quads, in rows, in int32.
  template <int sums, int a, int b>
  static void DotBytes() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(a), "i"(b));
  }
  // The same for pairs of bfloat16, in float32. Subnormals are zero.
  template <int sums, int a, int b>
  static void DotHalves() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(a), "i"(b));
  }

 private:
  // With those that convert floats to bfloat16, which all processors with tiles have.
  static bool HasInstructions() {
    unsigned eax, ebx, ecx, edx, low, high;
    // OSXSAVE, so that XGETBV can be asked what the system saves: 17 and 18 are tiles.
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx >> 27 & 1)) return false;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low >> 17 & 3) != 3) return false;
    constexpr unsigned kBFloat16 = 1 << 22, kTiles = 1 << 24, kInt8 = 1 << 25;
    constexpr unsigned kNeeded = kBFloat16 | kTiles | kInt8;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kNeeded) != kNeeded) return false;
    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1);
  }

  // Linux allocates memory for tiles only in processes that ask for it.
  static bool IsPermitted() {
#if defined(__linux__)
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
  }
};

}  // namespace jaxquant

#endif  // JAXQUANT_TILES

#endif  // JAXQUANT_KERNELS_CPU_TILES_H_
