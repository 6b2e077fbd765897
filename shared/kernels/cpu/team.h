// A fixed team of threads that runs one step together: every thread runs the same program, and the items of each stage are
// claimed from an atomic counter. So a thread that the system takes off its core delays one item, not its whole share.
// A run may use the first few threads only; the others sleep on.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace slipstream {

class Team {
  public:
    // One thread's place in the program: how many stages it has passed.
    struct Member {
        int index = 0;
        int stage = 0;
    };

    Team(int num_threads, int max_stages);
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    // Use the first `num_threads` threads from now on; all of them when it is 0 or there are not so many.
    void use(int num_threads) { size_ = num_threads < 1 || num_threads > all_ ? all_ : num_threads; }

    // Threads in use.
    int size() const { return size_; }

    // Run `program` on the threads in use, the caller being one of them; returns when all are through.
    void run(const std::function<void(Member&)>& program);

    // One stage: call work(i) for every i below `count`, each on some thread, then wait for all.
    template <typename Work>
    void each(Member& me, int64_t count, const Work& work) {
        std::atomic<int64_t>& next = counters_[me.stage++].value;
        if (size_ == 1) {
            for (int64_t i = 0; i < count; i++) work(i);
            return;
        }
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i);
        meet();
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

    void meet();
    void stop();
    void serve(int index);
    void call_next(int index);
    static void await_change(Word& word, uint32_t seen, int spins);
    static void advance(Word& word);

    const int all_;
    int size_;  // changes between runs; only threads that were called for the run read it
    std::vector<Counter> counters_;
    std::vector<Word> calls_;  // one for each thread: counts the runs it was called for
    alignas(64) std::atomic<int> arrived_{0};
    Word phase_;
    bool stopping_ = false;
    const std::function<void(Member&)>* program_ = nullptr;
    std::vector<std::thread> threads_;
};

}  // namespace slipstream
