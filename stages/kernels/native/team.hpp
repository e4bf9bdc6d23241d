// The threads that work on one call together, and the memory that they share.
//
//     engine.run(threads, [&](Team& team) {          every thread runs this
//         team.share(rows, [&](int row) { .. });     each row once, by whichever thread is free; then all wait
//         team.share(units, [&](int unit) { .. });
//     });
//
// What a unit computes depends on nothing but its number, so the results do not depend on who computes it.
//
// A thread that waits for the others spins, and gives the core away once that has lasted: where more threads than cores
// run, those that have work get them. Between calls the helpers spin for a moment, then sleep until the next call.
#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include <immintrin.h>

namespace tramontane {

/// Spins before a waiting thread begins to yield, and before a helper without work goes to sleep: some 20 us.
constexpr int SPINS = 1000;

/// Bind a helper to a core of its own, if the caller has just as many cores as threads: schedulers have been seen to
/// run two that wait for each other on one core. With cores to spare, shared with others, the scheduler knows better.
inline void pin(std::thread& helper, int member, int threads) {
    cpu_set_t mine, its;
    if (sched_getaffinity(0, sizeof mine, &mine) || CPU_COUNT(&mine) != threads) return;
    int core = -1;
    for (int passed = -1; passed < member; passed += CPU_ISSET(core, &mine) ? 1 : 0) ++core;
    CPU_ZERO(&its);
    CPU_SET(core, &its);
    pthread_setaffinity_np(helper.native_handle(), sizeof its, &its);
}

class Team {
public:
    Team(int threads, int member, std::atomic<int>& next, std::atomic<int>& arrived, std::atomic<int>& round)
        : threads_(threads), member_(member), next_(next), arrived_(arrived), round_(round) {}

    int member() const { return member_; }

    /// work(0) .. work(count - 1), each by one thread; afterwards all have been done. `then` runs once, after the last.
    template <class Work, class Then>
    void share(int count, Work&& work, Then&& then) {
        if (threads_ == 1) {
            for (int unit = 0; unit < count; ++unit) work(unit);
            then();
            return;
        }
        for (int unit; (unit = next_.fetch_add(1, std::memory_order_relaxed)) < count;) work(unit);
        wait_for_all(then);
    }

    template <class Work>
    void share(int count, Work&& work) {
        share(count, work, [] {});
    }

private:
    template <class Then>
    void wait_for_all(Then&& then) {
        const int round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
            then();
            arrived_.store(0, std::memory_order_relaxed);
            next_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins)
            spins < SPINS ? _mm_pause() : void(sched_yield());
    }

    const int threads_, member_;
    std::atomic<int>&next_, &arrived_, &round_;
};

/// Memory of one call: taken piece by piece before the threads start, all given back when the next call begins.
class Arena {
public:
    void reset() { used_ = 0, chunk_ = 0; }

    template <class Value>
    Value* take(int64_t count) {
        const int64_t bytes = (count * int64_t(sizeof(Value)) + 127) / 64 * 64;
        while (chunk_ < chunks_.size() && used_ + bytes > chunks_[chunk_].size) ++chunk_, used_ = 0;
        if (chunk_ == chunks_.size()) {
            const int64_t size = std::max<int64_t>(bytes, 1 << 20);
            chunks_.push_back({std::unique_ptr<char, decltype(&std::free)>(
                                   static_cast<char*>(std::aligned_alloc(64, size)), &std::free),
                               size});
            if (!chunks_.back().memory) throw std::bad_alloc();
        }
        Value* taken = reinterpret_cast<Value*>(chunks_[chunk_].memory.get() + used_);
        used_ += bytes;
        return taken;
    }

private:
    struct Chunk {
        std::unique_ptr<char, decltype(&std::free)> memory;
        int64_t size;
    };
    std::vector<Chunk> chunks_;
    size_t chunk_ = 0;
    int64_t used_ = 0;
};

}  // namespace tramontane

/// One caller's helpers and memory. One call at a time.
struct Engine {
public:
    ~Engine() {
        stopping_ = true;
        announce();
        for (std::thread& helper : helpers_) helper.join();
    }

    tramontane::Arena arena;

    /// Run `work` on so many threads, the caller's among them, and wait for all.
    template <class Work>
    void run(int threads, Work&& work) {
        while (int(helpers_.size()) < threads - 1) {
            const int member = int(helpers_.size()) + 1;
            helpers_.emplace_back([this, member, call = call_.load()] { help(member, call); });
            tramontane::pin(helpers_.back(), member, threads);
        }
        next_ = 0;
        work_ = [&work](tramontane::Team& team) { work(team); };
        threads_ = threads;
        finished_ = 0;
        if (threads > 1) announce();
        tramontane::Team team(threads, 0, next_, arrived_, round_);
        work(team);
        const int helpers = threads > 1 ? int(helpers_.size()) : 0;
        for (int spins = 0; finished_.load(std::memory_order_acquire) < helpers; ++spins)
            spins < tramontane::SPINS ? _mm_pause() : void(sched_yield());
    }

private:
    void announce() {
        call_.fetch_add(1, std::memory_order_release);
        call_.notify_all();
    }

    void help(int member, int call) {
        for (;; ++call) {
            for (int spins = 0; call_.load(std::memory_order_acquire) == call && spins < tramontane::SPINS; ++spins)
                _mm_pause();
            call_.wait(call, std::memory_order_acquire);
            if (stopping_) return;
            if (member < threads_) {
                tramontane::Team team(threads_, member, next_, arrived_, round_);
                work_(team);
            }
            finished_.fetch_add(1, std::memory_order_release);
        }
    }

    std::vector<std::thread> helpers_;
    std::function<void(tramontane::Team&)> work_;
    int threads_ = 1;
    bool stopping_ = false;
    alignas(64) std::atomic<int> call_{0};
    alignas(64) std::atomic<int> next_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> round_{0};
    alignas(64) std::atomic<int> finished_{0};
};
