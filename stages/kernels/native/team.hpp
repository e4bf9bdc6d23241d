// The threads that work on one call together, and the memory that they share.
//
//     engine.run(threads, [&](Team& team) {          every thread runs this
//         team.share(rows, [&](int row) { .. });     each row once, by whichever thread is free; then all wait
//         team.share(units, [&](int unit) { .. });
//     });
//
// What a unit computes depends on nothing but its number, so the results do not depend on who computes it.
//
// Nobody waits for a thread that is not there: a share is over when its units are done. A helper that the system wakes
// late, because others need its core, skips the shares that are over and joins the one that is not. What it reads
// between them may be out of date; it decides nothing, since the share that it was meant for is over then, too.
//
// A thread that waits for a unit of another spins, and gives the core away once that has lasted. Between calls the
// helpers spin for a moment, then sleep until the next call.
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

/// A thread takes one part in so many, times the threads, of what is left of a share.
constexpr uint32_t GUIDE = 2;

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

/// The share that is under way: its number in the call, the next unit, and how many are done.
struct Progress {
    alignas(64) std::atomic<uint64_t> claims{0};  // the number above, the next unit below
    alignas(64) std::atomic<uint32_t> done{0};

    static uint32_t share_of(uint64_t claims) { return uint32_t(claims >> 32); }
    static uint32_t unit_of(uint64_t claims) { return uint32_t(claims); }
    static uint64_t start_of(uint32_t share) { return uint64_t(share) << 32; }
};

class Team {
public:
    Team(int threads, int member, Progress& progress) : threads_(threads), member_(member), progress_(progress) {}

    int threads() const { return threads_; }
    int member() const { return member_; }

    /// The unit that this thread, at work on `unit` of so many, probably takes next.
    int likely_next(int unit, int units) const {
        if (unit + 1 < end_) return unit + 1;
        return std::min(int(Progress::unit_of(progress_.claims.load(std::memory_order_relaxed))), units - 1);
    }

    /// work(0) .. work(count - 1), each by one thread; afterwards all have been done. `then` runs once, after the last.
    ///
    /// A thread takes several units that follow one another, fewer the fewer are left: memory is read on from where it
    /// was, threads meet seldom, and end together ("guided self-scheduling", Polychronopoulos and Kuck, 1987).
    template <class Work, class Then>
    void share(int count, Work&& work, Then&& then) {
        if (threads_ == 1) {
            end_ = count;
            for (int unit = 0; unit < count; ++unit) work(unit);
            then();
            return;
        }
        const uint32_t mine = share_++, units = std::max(count, 1);
        uint64_t seen = progress_.claims.load(std::memory_order_acquire);
        while (Progress::share_of(seen) == mine && Progress::unit_of(seen) < units) {
            const uint32_t first = Progress::unit_of(seen), some = std::max(1u, (units - first) / (GUIDE * threads_));
            if (!progress_.claims.compare_exchange_weak(seen, seen + some, std::memory_order_acq_rel)) continue;
            end_ = int(first + some);
            if (count > 0)
                for (uint32_t unit = first; unit < first + some; ++unit) work(int(unit));
            if (progress_.done.fetch_add(some, std::memory_order_acq_rel) + some == units) {
                then();
                progress_.done.store(0, std::memory_order_relaxed);
                progress_.claims.store(Progress::start_of(mine + 1), std::memory_order_release);
                return;
            }
            seen = progress_.claims.load(std::memory_order_acquire);
        }
        for (int spins = 0; Progress::share_of(progress_.claims.load(std::memory_order_acquire)) == mine; ++spins)
            spins < SPINS ? _mm_pause() : void(sched_yield());
    }

    template <class Work>
    void share(int count, Work&& work) {
        share(count, work, [] {});
    }

private:
    const int threads_, member_;
    Progress& progress_;
    uint32_t share_ = 0;
    int end_ = 0;  // of the units that this thread has taken last
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

    /// Run `work` on so many threads, the caller's among them. It is done when this returns, and no helper is in it.
    template <class Work>
    void run(int threads, Work&& work) {
        while (int(helpers_.size()) < threads - 1) {
            const int member = int(helpers_.size()) + 1;
            helpers_.emplace_back([this, member, call = call_.load()] { help(member, call); });
            tramontane::pin(helpers_.back(), member, threads);
        }
        tramontane::Team team(threads, 0, progress_);
        if (threads == 1) return work(team);
        work_ = [&work](tramontane::Team& team) { work(team); };
        threads_ = threads;
        progress_.claims = 0;
        open_ = true;
        announce();
        work(team);
        // The order of these two, and of the helper's two, lets no helper in that is not seen here.
        open_ = false;
        for (int spins = 0; inside_; ++spins) spins < tramontane::SPINS ? _mm_pause() : void(sched_yield());
    }

private:
    void announce() {
        call_.fetch_add(1, std::memory_order_release);
        call_.notify_all();
    }

    void help(int member, int call) {
        for (;;) {
            for (int spins = 0; call_.load(std::memory_order_acquire) == call && spins < tramontane::SPINS; ++spins)
                _mm_pause();
            call_.wait(call, std::memory_order_acquire);
            call = call_.load(std::memory_order_acquire);
            if (stopping_) return;
            ++inside_;
            if (open_ && member < threads_) {
                tramontane::Team team(threads_, member, progress_);
                work_(team);
            }
            --inside_;
        }
    }

    std::vector<std::thread> helpers_;
    std::function<void(tramontane::Team&)> work_;
    int threads_ = 1;
    std::atomic<bool> stopping_{false};
    tramontane::Progress progress_;
    alignas(64) std::atomic<int> call_{0};
    alignas(64) std::atomic<bool> open_{false};
    alignas(64) std::atomic<int> inside_{0};
};
