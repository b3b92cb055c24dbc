// Stands for XLA's header where plain_loops.cc runs kernels on threads without XLA.

#ifndef JAXQUANT_TESTS_KERNELS_THREADS_H_
#define JAXQUANT_TESTS_KERNELS_THREADS_H_

#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace xla::ffi {

class ThreadPool {
 public:
  ~ThreadPool() {
    for (auto& thread : threads_) thread.join();
  }
  int64_t num_threads() const { return 4; }
  void Schedule(std::function<void()> work) {
    std::lock_guard<std::mutex> lock(mutex_);
    threads_.emplace_back(std::move(work));
  }

 private:
  std::mutex mutex_;
  std::vector<std::thread> threads_;
};

}  // namespace xla::ffi

#endif  // JAXQUANT_TESTS_KERNELS_THREADS_H_
