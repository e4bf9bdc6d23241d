// The functions that Python calls: memory is taken, the kind of weights and values chosen, and the team set to work.
#include "attention.hpp"
#include "experts.hpp"
#include "sampling.hpp"

using namespace tramontane;

namespace {

/// Call body(Weights, Value) with the types that the shape asks for.
template <class Body>
void with_types(const Shape& shape, Body&& body) {
    if (shape.weights == WEIGHTS_FLOAT32)
        body(Float32(), float());
    else if (shape.weights == WEIGHTS_BFLOAT16)
        body(BFloat16(), bfloat16());
    else if (shape.bfloat16)
        body(Int8(), bfloat16());
    else
        body(Int8(), float());
}

template <class Body>
auto with_weights(int32_t weights, Body&& body) {
    if (weights == WEIGHTS_FLOAT32) return body(Float32());
    if (weights == WEIGHTS_BFLOAT16) return body(BFloat16());
    return body(Int8());
}

void put(float& word_input, float value) { word_input = value; }
void put(bfloat16& word_input, float value) { word_input = to_bfloat16(value); }

template <class Weights>
using InWord = std::conditional_t<Weights::KIND == WEIGHTS_FLOAT32, float, bfloat16>;

/// Lay out a matrix whose output `number` is at row(number), null where it is padding.
template <class Weights, class Row>
void pack(int32_t outputs, int32_t inputs, Row&& row, void* to) {
    constexpr int PER_WORD = Weights::PER_WORD;
    const int64_t words = words_of<Weights>(inputs), panels = (outputs + COLUMNS - 1) / COLUMNS;
    auto* values = static_cast<InWord<Weights>*>(to);
    std::memset(to, 0, panels * words * COLUMNS * 4);
    for (int64_t output = 0; output < panels * COLUMNS; ++output) {
        const float* from = row(output);
        if (!from) continue;
        auto* panel = values + output / COLUMNS * words * COLUMNS * PER_WORD;
        for (int32_t input = 0; input < inputs; ++input)
            put(panel[(input / PER_WORD * COLUMNS + output % COLUMNS) * PER_WORD + input % PER_WORD], from[input]);
    }
}

bool all_below(const int32_t* numbers, int64_t count, int32_t end) {
    return std::all_of(numbers, numbers + count, [&](int32_t number) { return 0 <= number && number < end; });
}

}  // namespace

extern "C" {

int32_t tramontane_panel_columns(void) { return COLUMNS; }

const char* tramontane_variant(void) {
#if defined(__AMX_BF16__)
    return "amx";
#elif defined(__AVX512BF16__)
    return "avx512bf16";
#elif defined(__AVX512F__)
    return "avx512";
#else
    return "avx2";
#endif
}

Engine* tramontane_create(void) { return new Engine; }

void tramontane_destroy(Engine* engine) { delete engine; }

int64_t tramontane_packed_bytes(int32_t weights, int32_t outputs, int32_t inputs, int32_t interleaved) {
    const int64_t panels = interleaved ? (outputs + HALF - 1) / HALF : (outputs + COLUMNS - 1) / COLUMNS;
    return panels * 4 * with_weights(weights, [&](auto kind) { return panel_words<decltype(kind)>(inputs); });
}

void tramontane_pack(int32_t weights, const float* first, const float* second, int32_t outputs, int32_t inputs,
                     void* panels) {
    with_weights(weights, [&](auto kind) {
        const auto pack_rows = [&](int32_t count, auto&& row) {
            if constexpr (decltype(kind)::KIND == WEIGHTS_INT8)
                pack_groups(count, inputs, row, static_cast<uint32_t*>(panels));
            else
                pack<decltype(kind)>(count, inputs, row, panels);
        };
        if (!second)
            return pack_rows(outputs, [&](int64_t output) {
                return output < outputs ? first + output * inputs : nullptr;
            });
        pack_rows(int32_t(rounded_up(outputs, HALF)) * 2, [&](int64_t output) {
            const int64_t place = output % COLUMNS, mine = output / COLUMNS * HALF + place % HALF;
            return mine < outputs ? (place < HALF ? first : second) + mine * inputs : nullptr;
        });
    });
}

const char* tramontane_plan_flaw(const Plan* plan, int64_t blocks, int32_t pool) {
    int64_t held = 0, rows = 0;
    for (int32_t piece = 0; piece < plan->pieces; ++piece) {
        const int64_t first = plan->first[piece], length = plan->length[piece];
        if (first < 0 || length < 1) return "a piece without a place";
        if (plan->held[piece] < std::min<int64_t>((first + length - 1) / plan->block + 1, plan->ring))
            return "more blocks are needed";
        held += plan->held[piece];
        rows += length;
    }
    if (rows != plan->rows) return "pieces of other rows";
    if (held != blocks) return "other blocks in rings of these sizes";
    return all_below(plan->blocks, blocks, pool) ? nullptr : "not all are blocks of a pool of this size";
}

int64_t tramontane_cache_block(const Shape* shape, int32_t block) { return CacheLayout(*shape, block).block; }

void tramontane_attention(Engine* engine, int32_t threads, const Shape* shape, const Block* block, const float* from,
                          float* to) {
    with_types(*shape, [&](auto weights, auto value) {
        Arena& arena = engine->arena;
        arena.reset();
        const Plan& plan = *block->plan;
        const Step<decltype(value)> step(arena, *shape, plan, threads);
        const Rotation rotation(arena, *shape, plan.rows);
        const AttentionMemory<decltype(weights)> memory(arena, *shape, plan.rows);
        engine->run(threads, [&](Team& team) {
            team.share(plan.rows, [&](int row) {
                rotation.turn_to(row, step.pieces.position_of(row, step.pieces.piece_of(row)), shape->frequency);
            });
            attention(team, *shape, *block->layer, step, rotation, static_cast<decltype(value)*>(block->cache), memory,
                      from, to);
        });
    });
}

void tramontane_experts(Engine* engine, int32_t threads, const Shape* shape, const Layer* layer, int32_t rows,
                        const float* from, float* to) {
    with_weights(shape->weights, [&](auto weights) {
        engine->arena.reset();
        const ExpertsMemory<decltype(weights)> memory(engine->arena, *shape, rows);
        engine->run(threads, [&](Team& team) {
            experts(team, *shape, *layer, rows, memory, from, to);
        });
    });
}

void tramontane_blocks(Engine* engine, int32_t threads, const Shape* shape, const Block* blocks, int32_t count,
                       const float* from, float* to) {
    with_types(*shape, [&](auto weights, auto value) {
        using Weights = decltype(weights);
        using Value = decltype(value);
        Arena& arena = engine->arena;
        arena.reset();
        const int32_t rows = blocks[0].plan->rows;
        std::vector<const Plan*> plans;
        std::vector<Step<Value>> steps;
        std::vector<int> step_of;
        for (int32_t number = 0; number < count; ++number) {
            const auto known = std::find(plans.begin(), plans.end(), blocks[number].plan);
            step_of.push_back(int(known - plans.begin()));
            if (known == plans.end()) plans.push_back(blocks[number].plan);
        }
        steps.reserve(plans.size());
        for (const Plan* plan : plans) steps.emplace_back(arena, *shape, *plan, threads);
        const Rotation rotation(arena, *shape, rows);
        const AttentionMemory<Weights> attention_memory(arena, *shape, rows);
        const ExpertsMemory<Weights> experts_memory(arena, *shape, rows);
        engine->run(threads, [&](Team& team) {
            const Pieces& pieces = steps[0].pieces;
            team.share(rows, [&](int row) {
                rotation.turn_to(row, pieces.position_of(row, pieces.piece_of(row)), shape->frequency);
            });
            for (int32_t number = 0; number < count; ++number) {
                const Block& block = blocks[number];
                attention(team, *shape, *block.layer, steps[step_of[number]], rotation,
                          static_cast<Value*>(block.cache), attention_memory, number ? to : from, to);
                experts(team, *shape, *block.layer, rows, experts_memory, to, to);
            }
        });
    });
}

int32_t tramontane_widen(Engine* engine, int32_t threads, int32_t is_bfloat16, const void* from, int32_t from_rows,
                         const int32_t* numbers, int32_t rows, int32_t dim, float* to) {
    if (numbers && !all_below(numbers, rows, from_rows)) return 0;
    engine->run(threads, [&](Team& team) {
        team.share(rows, [&](int row) {
            const int64_t number = numbers ? numbers[row] : row;
            float* mine = to + int64_t(row) * dim;
            if (is_bfloat16)
                widen(mine, static_cast<const bfloat16*>(from) + number * dim, dim);
            else
                std::memcpy(mine, static_cast<const float*>(from) + number * dim, dim * sizeof(float));
        });
    });
    return 1;
}

int32_t tramontane_head(Engine* engine, int32_t threads, const Shape* shape, const float* norm_weight,
                        const Matrix* head, int32_t rows, const float* from, int32_t from_rows, const int32_t* numbers,
                        float* logits) {
    if (numbers && !all_below(numbers, rows, from_rows)) return 0;
    with_weights(shape->weights, [&](auto weights) {
        const int32_t dim = shape->dim;
        engine->arena.reset();
        const Operands<decltype(weights)> operands(engine->arena, rows, dim);
        float* normed = engine->arena.take<float>(int64_t(rows) * dim);
        engine->run(threads, [&](Team& team) {
            team.share(rows, [&](int row) {
                const float* mine = from + int64_t(numbers ? numbers[row] : row) * dim;
                norm(normed + int64_t(row) * dim, mine, norm_weight, dim, shape->norm_eps);
                operands.prepare(row, normed + int64_t(row) * dim);
            });
            product(team, *head, operands, rows, [&](int32_t row, int32_t first, const Floats(&values)[VECTORS]) {
                for (int vector = 0; vector < VECTORS && first + vector * WIDTH < head->outputs; ++vector)
                    store_within(logits + int64_t(row) * head->outputs, first + vector * WIDTH, head->outputs,
                                 values[vector]);
            });
        });
    });
    return 1;
}

void tramontane_sample(Engine* engine, int32_t threads, const Sampling* sampling, const float* logits,
                       const Sampled* to) {
    Arena& arena = engine->arena;
    arena.reset();
    std::vector<Urn> urns;
    std::vector<float*> allowed;
    for (int thread = 0; thread < threads; ++thread) {
        urns.emplace_back(arena, sampling->ids);
        allowed.push_back(arena.take<float>(sampling->ids));
    }
    int32_t* first_banned = arena.take<int32_t>(sampling->rows);
    for (int32_t row = 0, first = 0; row < sampling->rows; first += sampling->banned_count[row++])
        first_banned[row] = first;
    engine->run(threads, [&](Team& team) {
        team.share(sampling->rows, [&](int row) {
            sample_row(*sampling, row, first_banned[row], logits + row * sampling->stride, urns[team.member()],
                       allowed[team.member()], *to);
        });
    });
}

void tramontane_score(Engine* engine, int32_t threads, int32_t rows, int32_t ids, int64_t stride, const float* logits,
                      const int32_t* target, float* score) {
    engine->run(threads, [&](Team& team) {
        team.share(rows, [&](int row) {
            const float* of_row = logits + row * stride;
            score[row] = float(of_row[target[row]] - log_sum(of_row, ids, Peak(of_row, ids).most));
        });
    });
}

}  // extern "C"
