// Memory whose blocks end where a page begins that nothing may touch. The address sanitizer does not see
// masked loads and stores, which are intrinsics.

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

constexpr size_t kPage = 4096;

// A page that holds the size of all, then the block at the end of its pages, then the page to guard it.
void* operator new(size_t size, std::align_val_t alignment) {
  const size_t step = static_cast<size_t>(alignment), block = (size + step - 1) / step * step;
  const size_t pages = (block + kPage - 1) / kPage, all = (pages + 2) * kPage;
  void* start = mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) std::abort();
  *static_cast<size_t*>(start) = all;
  char* end = static_cast<char*>(start) + (pages + 1) * kPage;
  if (mprotect(end, kPage, PROT_NONE)) std::abort();
  return end - block;
}
// Aligned as far as the size is, so that nothing lies between the block and the page.
void* operator new(size_t size) {
  size = std::max<size_t>(size, 1);
  return operator new(size, std::align_val_t{std::min<size_t>(size & -size, 16)});
}
void operator delete(void* block) noexcept {
  if (!block) return;
  const uintptr_t page = reinterpret_cast<uintptr_t>(block) / kPage * kPage;
  auto* start = reinterpret_cast<size_t*>(page - kPage);
  munmap(start, *start);
}
void operator delete(void* block, size_t) noexcept { operator delete(block); }
void operator delete(void* block, std::align_val_t) noexcept { operator delete(block); }
void operator delete(void* block, size_t, std::align_val_t) noexcept { operator delete(block); }
