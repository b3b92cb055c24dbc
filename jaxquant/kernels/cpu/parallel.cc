// Shares one product among XLA's threads.

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>

#include "common.h"
#include "xla/ffi/api/ffi.h"

namespace jaxquant {
namespace {

// One call of Parallel. Threads that start late may see it after the call has returned, so the last
// one to use it deletes it. (std::shared_ptr would do the same, but needs glibc 2.32.)
struct Job {
  std::function<void(int64_t, int64_t)> work;
  int64_t count, least, multiple, threads;
  std::atomic<int64_t> users;
  std::atomic<int64_t> next{0}, done{0};
  std::mutex mutex{};
  std::condition_variable all_done{};

  // Where the piece that starts at `begin` ends. Pieces become smaller, so that all threads finish at
  // the same time: the cores of one machine are rarely equally fast.
  int64_t End(int64_t begin) const {
    int64_t size = std::max(least, (count - begin) / (threads * 4));
    return std::min(begin + (size + multiple - 1) / multiple * multiple, count);
  }

  // Works on pieces until none is left.
  void Run() {
    for (int64_t begin = next.load(); begin < count;) {
      int64_t end = End(begin);
      if (!next.compare_exchange_weak(begin, end)) continue;
      work(begin, end);
      if (done.fetch_add(end - begin) + end - begin == count) {
        std::lock_guard<std::mutex> lock(mutex);
        all_done.notify_one();
      }
      begin = next.load();
    }
  }

  // Spins for a while before it sleeps: waking up takes longer than most pieces.
  void Wait() {
    using Clock = std::chrono::steady_clock;
    for (auto until = Clock::now() + std::chrono::microseconds(100); Clock::now() < until;)
      if (done.load() == count) return;
    std::unique_lock<std::mutex> lock(mutex);
    all_done.wait(lock, [&] { return done.load() == count; });
  }

  void Release() {
    if (users.fetch_sub(1) == 1) delete this;
  }
};

}  // namespace

int64_t Threads(ThreadPool& pool) { return pool.num_threads(); }

// Waits for pieces that were begun, not for threads that were asked: all threads of the pool may
// themselves be waiting in such calls.
void Parallel(ThreadPool& pool, int64_t count, int64_t least, int64_t multiple,
              std::function<void(int64_t, int64_t)> work) {
  int64_t threads = std::min(pool.num_threads(), std::max<int64_t>(1, count / least));
  if (threads <= 1) return work(0, count);
  auto* job = new Job{std::move(work), count, least, multiple, threads, {threads}};
  for (int64_t i = 0; i + 1 < threads; ++i)
    pool.Schedule([job] {
      job->Run();
      job->Release();
    });
  job->Run();
  job->Wait();
  job->Release();
}

}  // namespace jaxquant
