#include "team.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace slipstream {

namespace {

constexpr int STAGE_SPINS = 4000;  // some ten microseconds: stages are that long
constexpr int STEP_SPINS = 2000;

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

void sleep_while(std::atomic<uint32_t>& word, uint32_t seen) {
#if defined(__linux__)
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
#else
    std::this_thread::yield();
#endif
}

void wake_all(std::atomic<uint32_t>& word) {
#if defined(__linux__)
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
#else
    (void)word;
#endif
}

}  // namespace

Team::Team(int num_threads, int max_stages) : size_(num_threads), counters_(max_stages) {
    try {
        for (int i = 1; i < size_; i++) threads_.emplace_back([this, i] { serve(i); });
    } catch (...) {  // the system has no more threads to give
        stop();
        throw;
    }
}

Team::~Team() { stop(); }

void Team::stop() {
    stopping_ = true;
    advance(epoch_);
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
}

void Team::run(const std::function<void(Member&)>& program) {
    for (Counter& counter : counters_) counter.value.store(0, std::memory_order_relaxed);
    Member me;
    if (size_ == 1) {
        program(me);
        return;
    }
    program_ = &program;
    advance(epoch_);
    program(me);
    meet();  // nobody may still look at `program` when the caller goes on
}

void Team::serve(int index) {
    uint32_t seen = 0;
    for (;;) {
        await_change(epoch_, seen, STEP_SPINS);
        seen = epoch_.value.load(std::memory_order_acquire);
        if (stopping_) return;
        Member me;
        me.index = index;
        (*program_)(me);
        meet();
    }
}

void Team::meet() {
    uint32_t phase = phase_.value.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
        arrived_.store(0, std::memory_order_relaxed);
        advance(phase_);
    } else {
        await_change(phase_, phase, STAGE_SPINS);
    }
}

void Team::await_change(Word& word, uint32_t seen, int spins) {
    for (int i = 0; i < spins; i++) {
        if (word.value.load(std::memory_order_acquire) != seen) return;
        relax();
    }
    word.sleepers.fetch_add(1, std::memory_order_seq_cst);
    while (word.value.load(std::memory_order_seq_cst) == seen) sleep_while(word.value, seen);
    word.sleepers.fetch_sub(1, std::memory_order_relaxed);
}

void Team::advance(Word& word) {
    word.value.fetch_add(1, std::memory_order_seq_cst);
    if (word.sleepers.load(std::memory_order_seq_cst)) wake_all(word.value);
}

}  // namespace slipstream
