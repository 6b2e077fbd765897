#include "team.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
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

// Profilers tell the threads apart by it.
void name_this_thread() {
#if defined(__linux__)
    pthread_setname_np(pthread_self(), "sl-compute");
#endif
}

#if defined(__linux__)
std::vector<int> usable_cpus() {
    cpu_set_t set;
    std::vector<int> cpus;
    if (sched_getaffinity(0, sizeof set, &set) == 0)
        for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
            if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
    return cpus;
}

// Where this thread was put last, by whichever team: a model and its draft are computed by the same one.
thread_local int caller_cpu = -1;

void place(pthread_t thread, int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    pthread_setaffinity_np(thread, sizeof set, &set);
}
#endif

}  // namespace

Team::Team(int num_threads) : all_(num_threads), size_(num_threads), calls_(num_threads) {
#if defined(__linux__)
    cpus_ = usable_cpus();  // now: later the thread that makes a step may have been placed on one of them by another team
#endif
    try {
        for (int i = 1; i < all_; i++) threads_.emplace_back([this, i] { serve(i); });
    } catch (...) {  // the system has no more threads to give
        stop();
        throw;
    }
}

Team::~Team() { stop(); }

void Team::use(const Share& share) {
    use(share.count);
#if defined(__linux__)
    if (all_ < (int)cpus_.size()) return;  // fewer threads than cores: the system finds the best ones
    const int mine = cpus_[share.first % cpus_.size()];
    if (mine != caller_cpu) place(pthread_self(), caller_cpu = mine);
    if (share == placed_) return;
    placed_ = share;
    for (int i = 1; i < size_; i++) place(threads_[i - 1].native_handle(), cpus_[(share.first + i) % cpus_.size()]);
#endif
}

void Team::stop() {
    stopping_ = true;
    for (Word& call : calls_) advance(call);
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
}

void Team::run(const std::function<void(Member&)>& program) {
    for (Counter& counter : counters_[0]) counter.value.store(0, std::memory_order_relaxed);
    Member me;
    if (size_ == 1) {
        program(me);
        return;
    }
    program_ = &program;
    call_next(0);
    program(me);
    meet(me);  // nobody may still look at `program` when the caller goes on
}

// Each thread calls two others: with many of them no thread has all the calls to make.
void Team::call_next(int index) {
    for (int next = 2 * index + 1; next <= 2 * index + 2 && next < size_; next++) advance(calls_[next]);
}

void Team::serve(int index) {
    name_this_thread();
    for (uint32_t calls = 0;; calls++) {
        Member me;
        me.index = index;
        await_change(calls_[index], calls, STEP_SPINS, me);
        if (stopping_) return;
        call_next(index);
        (*program_)(me);
        meet(me);
    }
}

void Team::meet(Member& me) {
    const uint32_t phase = phase_.value.load(std::memory_order_acquire);
    const int members = size_;  // read before arriving: after the last meeting of a run the caller may change it
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == members) {
        arrived_.store(0, std::memory_order_relaxed);
        advance(phase_);
    } else {
        await_change(phase_, phase, STAGE_SPINS, me);
    }
}

void Team::await_change(Word& word, uint32_t seen, int spins, Member& me) {
    for (int i = 0; i < spins; i++) {
        if (word.value.load(std::memory_order_acquire) != seen) return;
        if (me.ahead < me.ahead_end)
            me.fetch_line();
        else
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
