// The memory of large tensors, kept for the next ones while a run trains.
//
// C's heap has neither of the two properties that a step wants. It returns its largest blocks to the system, so that
// every step waits for new pages. And it mixes large blocks with small ones that outlive the step, so that the blocks of
// the next step, which are a little longer, do not fit between them: the heap grows from step to step.
#pragma once

#include "rows.h"

#include <c10/core/CPUAllocator.h>

#include <atomic>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>
#endif

namespace phinetune {

// Hands out the bytes of one range of addresses, the smallest free block that is large enough first. Neighbouring free
// blocks are joined. The range begins without memory, and takes it as it is needed.
class KeptMemory final : public c10::Allocator {
 public:
  static constexpr size_t LEAST = 1 << 20;  // bytes of a tensor; smaller ones come out of C's heap, as before

  // plain: gives what does not come from here.
  KeptMemory(char* start, size_t size, c10::Allocator* plain)
      : start_(start), end_(start), limit_(start + size), plain_(plain) {}

  c10::DataPtr allocate(size_t size) override {
    char* block = keeps_ && size >= LEAST ? take(padded(size, PAGE)) : nullptr;
    return block ? c10::DataPtr(block, block, &drop, c10::DeviceType::CPU) : plain_->allocate(size);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &drop; }
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }

  // Whether new tensors come from here. What was handed out stays valid; what is free goes back to the system.
  void keep(bool on) {
    const std::lock_guard<std::mutex> guard(mutex_);
    keeps_ = on;
    for (auto block = free_.begin(); !on && block != free_.end(); ++block) {
      give_back(block->first, block->second);
    }
  }

  std::mutex& mutex() { return mutex_; }

  // The one of this process; none where the system does not give a range of addresses.
  static KeptMemory* of_process() {
    static KeptMemory* const made = make();
    return made;
  }

 private:
  static constexpr size_t PAGE = 4096, HUGE_PAGE = 2 << 20;

  static size_t padded(size_t size, size_t to) { return (size + to - 1) / to * to; }

  static void drop(void* block) {
    KeptMemory* self = of_process();
    char* const start = static_cast<char*>(block);
    if (start >= self->start_ && start < self->limit_) {
      self->put_back(start);
    } else {
      self->plain_->raw_deleter()(block);  // handed out before, or small
    }
  }

  char* take(size_t size) {
    const std::lock_guard<std::mutex> guard(mutex_);
    auto found = by_size_.lower_bound({size, nullptr});
    if (found == by_size_.end() && !grow(size)) {
      return nullptr;
    }
    found = by_size_.lower_bound({size, nullptr});
    const auto [whole, start] = *found;
    erase(free_.find(start));
    if (whole > size) {
      insert(start + size, whole - size);
    }
    taken_[start] = size;
    return start;
  }

  void put_back(char* start) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto of = taken_.find(start);
    const size_t size = of->second;
    taken_.erase(of);
    if (!keeps_) {
      give_back(start, size);
    }
    insert(start, size);
  }

  // Returns a block's memory to the system. Its addresses stay, and get new memory when they are written to.
  static void give_back(char* start, size_t size) {
#if defined(__linux__)
    madvise(start, size, MADV_DONTNEED);
#endif
  }

  // Makes the range's end a free block of `size` bytes or more.
  bool grow(size_t size) {
#if defined(__linux__)
    const auto last = free_.empty() ? free_.end() : std::prev(free_.end());
    const size_t there = last != free_.end() && last->first + last->second == end_ ? last->second : 0;
    const size_t more = padded(size - there, HUGE_PAGE);
    if (more > static_cast<size_t>(limit_ - end_) || mprotect(end_, more, PROT_READ | PROT_WRITE)) {
      return false;
    }
    insert(end_, more);
    end_ += more;
    return true;
#else
    return false;
#endif
  }

  // Adds a free block, joined with free neighbours.
  void insert(char* start, size_t size) {
    auto next = free_.lower_bound(start);
    if (next != free_.end() && start + size == next->first) {
      size += next->second;
      next = erase(next);
    }
    if (next != free_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == start) {
        start = before->first;
        size += before->second;
        erase(before);
      }
    }
    free_[start] = size;
    by_size_.insert({size, start});
  }

  std::map<char*, size_t>::iterator erase(std::map<char*, size_t>::iterator block) {
    by_size_.erase({block->second, block->first});
    return free_.erase(block);
  }

  // Reserves as many addresses as the machine has memory. A limit of addresses would count them, so there are none then.
  static KeptMemory* make() {
#if defined(__linux__)
    rlimit limit;
    if (getrlimit(RLIMIT_AS, &limit) || limit.rlim_cur != RLIM_INFINITY) {
      return nullptr;
    }
    const size_t size = padded(static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE), HUGE_PAGE);
    void* range = mmap(nullptr, size + HUGE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED) {
      return nullptr;
    }
    char* start = reinterpret_cast<char*>(padded(reinterpret_cast<size_t>(range), HUGE_PAGE));
    madvise(start, size, MADV_HUGEPAGE);  // fewer pages to wait for; where the system has none, it says so, and that is all
    auto* made = new KeptMemory(start, size, c10::GetCPUAllocator());  // until the process ends, as tensors may last
    c10::SetCPUAllocator(made);
    pthread_atfork(
        [] { of_process()->mutex().lock(); }, [] { of_process()->mutex().unlock(); },
        [] { of_process()->mutex().unlock(); });
    return made;
#else
    return nullptr;
#endif
  }

  char *start_, *end_, *limit_;  // [start, end) has memory, [end, limit) only addresses
  c10::Allocator* plain_;
  std::atomic<bool> keeps_ = false;
  std::mutex mutex_;
  std::map<char*, size_t> free_;
  std::set<std::pair<size_t, char*>> by_size_;
  std::unordered_map<char*, size_t> taken_;
};

// Whether large tensors of this process are given kept memory from now on. Returns whether there is such memory.
bool keep_memory(bool on) {
  KeptMemory* const memory = KeptMemory::of_process();
  if (memory) {
    memory->keep(on);
  }
  return memory != nullptr;
}

}  // namespace phinetune
