// A fixed team of threads that runs one step together: every thread runs the same program. The items of each stage lie in a
// few ranges; a thread takes one after the other from its own range, so that it reads memory in order, and then helps in the
// others. So a thread that the system takes off its core delays one item, not its whole share.
// A run may use the first few threads only; the others sleep on.
#pragma once

#include "cores.h"

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace slipstream {

class Team {
  public:
    // One thread's place in the program: how many stages it has passed, and memory it will read after a meeting to come,
    // which it fetches into its cache while it waits.
    struct Member {
        int index = 0;
        int stage = 0;
        const char* ahead = nullptr;
        const char* ahead_end = nullptr;

        void fetch_line() {
            __builtin_prefetch(ahead, 0, 2);
            ahead += 64;
        }
    };

    explicit Team(int num_threads);
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    // Use the first `num_threads` threads from now on; all of them when it is 0 or there are not so many.
    void use(int num_threads) { size_ = num_threads < 1 || num_threads > all_ ? all_ : num_threads; }

    // Use as many threads as the share has cores, each on one of them. On a core of its own a thread is not moved beside
    // another of the team when some other process wakes for a moment, which costs a whole time slice.
    void use(const Share& share);

    // Threads in use.
    int size() const { return size_; }

    // Run `program` on the threads in use, the caller being one of them; returns when all are through.
    void run(const std::function<void(Member&)>& program);

    // The first of `count` items that this thread takes in a stage.
    int64_t first_item(const Member& me, int64_t count) const { return count * (me.index % num_ranges()) / num_ranges(); }

    // One stage: call work(i) for every i below `count`, each on some thread, then wait for all.
    template <typename Work>
    void each(Member& me, int64_t count, const Work& work) {
        if (size_ == 1) {
            for (int64_t i = 0; i < count; i++) work(i);
            return;
        }
        const int ranges = num_ranges();
        Counter* taken = counters_[me.stage % 2];
        // Nobody has read the other stage's counter since the last meeting, and nobody will before the next one.
        me.stage++;
        if (me.index < ranges) counters_[me.stage % 2][me.index].value.store(0, std::memory_order_relaxed);
        for (int turn = 0; turn < ranges; turn++) {
            const int range = (me.index + turn) % ranges;
            const int64_t begin = count * range / ranges, end = count * (range + 1) / ranges;
            std::atomic<int64_t>& next = taken[range].value;
            while (begin + next.load(std::memory_order_relaxed) < end) {
                int64_t i = begin + next.fetch_add(1, std::memory_order_relaxed);
                if (i < end) work(i);
            }
        }
        meet(me);
    }

  private:
    struct alignas(64) Counter {
        std::atomic<int64_t> value{0};
    };
    // A 32-bit word threads wait on: they spin for a while, then sleep in the kernel.
    struct alignas(64) Word {
        std::atomic<uint32_t> value{0};
        std::atomic<int> sleepers{0};
    };

    // Few, because who has finished looks into all of them.
    static constexpr int MAX_RANGES = 8;

    int num_ranges() const { return size_ < MAX_RANGES ? size_ : MAX_RANGES; }
    void meet(Member& me);
    void stop();
    void serve(int index);
    void call_next(int index);
    static void await_change(Word& word, uint32_t seen, int spins, Member& me);
    static void advance(Word& word);

    const int all_;
    std::vector<int> cpus_;  // that this process may use
    Share placed_{0, 0};     // the last one that the threads beside the caller were placed for
    int size_;  // changes between runs; only threads that were called for the run read it
    Counter counters_[2][MAX_RANGES];  // items taken of each range, of this stage and the next in turn
    std::vector<Word> calls_;  // one for each thread: counts the runs it was called for
    alignas(64) std::atomic<int> arrived_{0};
    Word phase_;
    bool stopping_ = false;
    const std::function<void(Member&)>* program_ = nullptr;
    std::vector<std::thread> threads_;
};

}  // namespace slipstream
