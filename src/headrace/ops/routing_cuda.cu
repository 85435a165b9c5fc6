// normed = rms_norm(x + residual); logits = normed W^T + b; softmax of the top k; slots by expert.
// Adapters add scale (normed A^T) B to the logits.
//
// What router_kernel (routing_kernel.py) does for up to 128 tokens, with its bits. A thread block
// cluster takes TOKENS tokens: a program OWN slices of 256 columns, a warp one token's part of
// them. Sums of squares and partial logits meet in shared memory of the cluster, where Triton's
// programs meet at counters in global memory: that is half of its time. Every sum of floats has
// Triton's order: a row's squares 8 columns a thread, then threads, then warps, by halves;
// products in steps of 16 columns; the slices' logits from the first to the last. So have the
// adapters' products, of tokens with ranks, then with experts.
//
// Who compiles this defines HIDDEN, EXPERTS (padded to whole words of 32), TOP_K, RENORMALIZE,
// TOKENS, PROGRAMS (of a cluster), OWN and SHARED_BYTES.

constexpr int THREADS = 512, MAX_TOKENS = 128;
constexpr int FEW = 2;  // up to so many tokens every program sums the squares of whole rows itself
constexpr int SLICES = PROGRAMS * OWN, WORDS = EXPERTS / 32;  // expert e: bit e % 32 of word e / 32
constexpr int RANKS = 512;  // of a token's x A^T that are multiplied with B at once
// of 8 ranks of a factor A, a program's columns of them, that have room in the place of the weight
constexpr int TILES = EXPERTS / 8;
// bytes of a row in shared memory: 16 more than its data, so that ldmatrix meets each bank once
constexpr int W_PITCH = 512 + 16, X_PITCH = OWN * 512 + 16;
constexpr unsigned ALL = ~0u;

struct Arguments {  // as in routing_cuda.py; bf16 as its bits
  const unsigned short *x, *residual, *norm, *weight, *bias;  // residual and bias may be null
  unsigned short *summed, *normed;
  int *ids;         // [num_tokens, TOP_K]
  float *weights;   // [num_tokens, TOP_K]
  int *slots;
  int4 *blocks;
  unsigned *masks;    // [num_tokens, WORDS]: the experts held here that a token goes to
  unsigned *counter;  // of clusters that have arrived; zero before and after
  const int *slot_of_token;      // the adapter of each token, -1: none; null: no adapters
  const unsigned short *memory;  // LoraWeights.memory
  const long long *a, *b;        // of each adapter, as in LoraSite
  const int *rank;
  const float *scale;
  float eps;
  int num_tokens, num_experts, num_blocks, block_m, first_expert, num_local, num_adapters;
};

struct Shared {
  float squares[TOKENS][16];
  union {
    float logits[SLICES][TOKENS][EXPERTS];  // the slices' parts; the first program's is used
    unsigned u[TOKENS][RANKS / 2];          // then there: the adapters' x A^T, pairs of bf16
    float sums[2][TILES][4][32];  // in the others: x A^T over the columns of the programs before
  };
  unsigned masks[MAX_TOKENS][WORDS];
  int experts[MAX_TOKENS * TOP_K];
  unsigned tokens[MAX_TOKENS / 32][EXPERTS];  // those that go to an expert, as bits
  int first_row[EXPERTS];
  int is_last;
  alignas(128) char x[TOKENS * X_PITCH];
  alignas(128) char weight[OWN * EXPERTS * W_PITCH];
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "SHARED_BYTES");
static_assert(SLICES <= 16 && SLICES * 256 >= HIDDEN && HIDDEN % 8 == 0, "HIDDEN");
static_assert(WORDS * 32 == EXPERTS && WORDS <= 4 && TOKENS <= 16, "EXPERTS, TOKENS");
static_assert(TILES * 8 * X_PITCH <= OWN * EXPERTS * W_PITCH && PROGRAMS > 1, "TILES");

// ---- instructions

__device__ unsigned in_shared(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }
// 16 bytes from global to shared memory, of which the last may be zeros
__device__ void copy_async(void *to, const void *from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               ::"r"(in_shared(to)), "l"(from), "r"(bytes));
}
__device__ void prefetch(const void *from, int bytes) {  // into L2
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes));
}
__device__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
__device__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;"); }
// a barrier of the cluster in two halves: what was stored before arrive is seen after wait
__device__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ void store_in_program(int program, float *p, float v) {
  unsigned remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(in_shared(p)), "r"(program));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(v) : "memory");
}
__device__ unsigned count_in(unsigned *counter) {
  unsigned before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;"
               : "=r"(before) : "l"(counter) : "memory");
  return before;
}
__device__ void load_matrices(unsigned (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(in_shared(row)));
}
__device__ void multiply_add(float (&acc)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ unsigned bf16_pair(float low, float high) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
// as Triton takes them
__device__ float inverse_root(float v) {
  asm("rsqrt.approx.ftz.f32 %0, %0;" : "+f"(v));
  return v;
}
__device__ float power_of_2(float v) {
  asm("ex2.approx.f32 %0, %0;" : "+f"(v));
  return v;
}
__device__ float divide(float a, float b) {
  asm("div.full.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
  return a;
}

// ---- end of instructions

__device__ float low(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ float high(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ float bf16(unsigned short bits) { return low(bits); }
__device__ unsigned pair(const unsigned short *p) { return *(const unsigned *)p; }

// An integer that rises with the float, above 0, and the float of one.
__device__ unsigned rising(float v) {
  const unsigned bits = __float_as_uint(v);
  return bits ^ (bits >> 31 ? ~0u : 0x80000000u);
}
__device__ float risen(unsigned key) {
  return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : ~0u));
}

template <typename T>
__device__ T sum_of_warp(T v, int lanes = 32) {
  for (int far = lanes / 2; far; far /= 2) v += __shfl_xor_sync(ALL, v, far);
  return v;
}

// v of this lane and those below it.
__device__ int sum_up_to_lane(int v) {
  for (int far = 1; far < 32; far *= 2) {
    const int below = __shfl_up_sync(ALL, v, far);
    if (threadIdx.x % 32 >= far) v += below;
  }
  return v;
}

// x + residual, rounded, of 8 columns of a token; zeros from HIDDEN on.
__device__ uint4 load_sum(const Arguments &g, int token, int column) {
  if (column >= HIDDEN) return make_uint4(0, 0, 0, 0);
  const int place = token * HIDDEN + column;
  uint4 x = *(const uint4 *)(g.x + place);
  if (g.residual) {
    const uint4 added = *(const uint4 *)(g.residual + place);
    x.x = bf16_pair(low(x.x) + low(added.x), high(x.x) + high(added.x));
    x.y = bf16_pair(low(x.y) + low(added.y), high(x.y) + high(added.y));
    x.z = bf16_pair(low(x.z) + low(added.z), high(x.z) + high(added.z));
    x.w = bf16_pair(low(x.w) + low(added.w), high(x.w) + high(added.w));
  }
  return x;
}

__device__ float sum_of_squares(uint4 x) {
  const unsigned pairs[4] = {x.x, x.y, x.z, x.w};
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; i++) {  // the square of a bf16 is exact in float32
    sum = fmaf(low(pairs[i]), low(pairs[i]), sum);
    sum = fmaf(high(pairs[i]), high(pairs[i]), sum);
  }
  return sum_of_warp(sum);
}

__device__ unsigned scaled(unsigned x, float scale, unsigned norm) {
  return bf16_pair(low(x) * scale * low(norm), high(x) * scale * high(norm));
}

// One slice's part of the logits of 16 experts and 8 tokens, to the first program.
__device__ void multiply(Shared &sh, int own, int group, int half, int num_here) {
  const int lane = threadIdx.x % 32, slice = blockIdx.x * OWN + own, row = half * 8 + lane % 8;
  const char *w = sh.weight + (own * EXPERTS + group * 16 + lane % 16) * W_PITCH + lane / 16 * 16;
  const char *x = sh.x + min(row, num_here - 1) * X_PITCH + own * 512 + lane / 8 * 16;
  float acc[4] = {0.f, 0.f, 0.f, 0.f};
  const int end = min(256, HIDDEN - slice * 256);
  for (int k = 0; k < end; k += 32) {  // 16 columns at once; columns from HIDDEN on are zeros
    unsigned a[4], b[4];
    load_matrices(b, x + k * 2);
    load_matrices(a, w + k * 2);
    multiply_add(acc, a, b[0], b[1]);
    load_matrices(a, w + k * 2 + 32);
    multiply_add(acc, a, b[2], b[3]);
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int token = half * 8 + lane % 4 * 2 + i % 2, expert = group * 16 + lane / 4 + i / 2 * 8;
    if (token < num_here) store_in_program(0, &sh.logits[slice][token][expert], acc[i]);
  }
}

// The logits of token `here` of this cluster: the slices' parts in their order, then the bias.
__device__ void add_slices(const Shared &sh, int here, const float (&bias)[WORDS],
                           float (&logits)[WORDS]) {
#pragma unroll
  for (int w = 0; w < WORDS; w++) {
    float sum = 0.f;
#pragma unroll
    for (int slice = 0; slice < SLICES; slice++)
      sum += sh.logits[slice][here][w * 32 + threadIdx.x % 32];
    logits[w] = sum + bias[w];
  }
}

struct Tile {  // 8 ranks of an adapter
  const unsigned short *a;
  int num_ranks;    // of the adapter from the first of these on
  int place;        // in u
  unsigned tokens;  // that have the adapter
  float scale;
};

// The tiles of each adapter from rank first_r on. An adapter is at the lane of its first token.
struct Tiles {
  long long a;
  int rank, first_r, first, end;  // the adapter has the tiles from first to end, if any
  unsigned tokens;
  float scale;

  __device__ Tiles(const Arguments &g, int adapter, int rank, int first_r)
      : rank(rank), first_r(first_r) {
    tokens = __match_any_sync(ALL, adapter);
    const bool here = rank > first_r && __ffs(tokens) - 1 == threadIdx.x % 32;
    const int tiles = here ? (min(rank - first_r, RANKS) + 15) / 16 * 2 : 0;  // `expand` takes 16
    end = sum_up_to_lane(tiles);
    first = end - tiles;
    a = here ? g.a[adapter] : 0;
    scale = here ? g.scale[adapter] : 0.f;
  }
  __device__ int count() const { return __shfl_sync(ALL, end, 31); }
  __device__ Tile get(const Arguments &g, int index) const {  // index < count()
    const int lane = __ffs(__ballot_sync(ALL, end > index)) - 1;
    const int place = (index - __shfl_sync(ALL, first, lane)) * 8;
    return {g.memory + __shfl_sync(ALL, a, lane) + (first_r + place) * HIDDEN,
            __shfl_sync(ALL, rank, lane) - first_r - place, place,
            __shfl_sync(ALL, tokens, lane), __shfl_sync(ALL, scale, lane)};
  }
};

// This program's columns of a tile, to its warp's part of the weight's place; zeros for ranks and
// columns that do not exist.
__device__ void load_tile(Shared &sh, const Tile &tile) {
  char *to = sh.weight + threadIdx.x / 32 * 8 * X_PITCH;
  for (int i = threadIdx.x % 32; i < 8 * OWN * 32; i += 32) {
    const int row = i / (OWN * 32), part = i % (OWN * 32) * 8;
    const int column = blockIdx.x * OWN * 256 + part;
    const bool exists = row < tile.num_ranks && column < HIDDEN;
    copy_async(to + row * X_PITCH + part * 2, tile.a + (exists ? row * HIDDEN + column : 0),
               exists ? 16 : 0);
  }
}

// sums += x A^T of this warp's tile, over this program's columns. Of tokens that do not exist the
// last that does is read.
__device__ void multiply_tile(const Shared &sh, int num_here, float (&sums)[4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const char *x = sh.x + min(lane % 16, num_here - 1) * X_PITCH + lane / 16 * 16;
  const char *a = sh.weight + (warp * 8 + lane % 8) * X_PITCH + lane / 8 * 16;
  const int end = min(OWN * 256, HIDDEN - (int)blockIdx.x * OWN * 256);
#pragma unroll 4
  for (int k = 0; k < end; k += 32) {  // columns from HIDDEN on are zeros
    unsigned rows[4], ranks[4];
    load_matrices(ranks, a + k * 2);
    load_matrices(rows, x + k * 2);
    multiply_add(sums, rows, ranks[0], ranks[1]);
    load_matrices(rows, x + k * 2 + 32);
    multiply_add(sums, rows, ranks[2], ranks[3]);
  }
}

// u = scale sums, rounded, of a tile, to the first program.
__device__ void store_tile(Shared &sh, const Tile &tile, const float (&sums)[4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int here = lane / 4 + i * 8;
    const unsigned u = bf16_pair(sums[i * 2] * tile.scale, sums[i * 2 + 1] * tile.scale);
    if (tile.tokens >> here & 1)
      store_in_program(0, (float *)&sh.u[here][tile.place / 2 + lane % 4], __uint_as_float(u));
  }
}

// u = scale (x A^T), rounded, of up to RANKS ranks from first_r on, to the first program.
//
// The sum over the columns has one order: TILES tiles at once, a warp each, go from program to
// program, and each adds its columns to the sums of the one before. In round r program p has the
// tiles from (r - p) TILES on; a barrier of the cluster ends it.
__device__ void shrink(const Arguments &g, Shared &sh, int adapter, int rank, int first_r,
                       int num_here) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, program = blockIdx.x;
  const Tiles tiles(g, adapter, rank, first_r);
  const int count = tiles.count(), rounds = (count + TILES - 1) / TILES + PROGRAMS - 1;
  int index = warp < TILES ? warp : count;  // of this warp's tile
  Tile tile;
  if (index < count) load_tile(sh, tile = tiles.get(g, index));
  for (int i = program * (THREADS / 32) + warp; i < count; i += PROGRAMS * (THREADS / 32)) {
    const Tile whole = tiles.get(g, i);  // to L2, before a round asks for it
    if (lane == 0 && whole.num_ranks > 0)
      prefetch(whole.a, min(whole.num_ranks, 8) * HIDDEN * 2);
  }
  for (int round = 0; round < rounds; round++) {
    wait_for_copies();
    __syncwarp();
    if (round >= program && index < count) {
      float sums[4] = {};
      if (program > 0) {
#pragma unroll
        for (int i = 0; i < 4; i++) sums[i] = sh.sums[round % 2][warp][i][lane];
      }
      multiply_tile(sh, num_here, sums);
      if (program < PROGRAMS - 1) {
#pragma unroll
        for (int i = 0; i < 4; i++)
          store_in_program(program + 1, &sh.sums[(round + 1) % 2][warp][i][lane], sums[i]);
      } else {
        store_tile(sh, tile, sums);
      }
      __syncwarp();  // all lanes have read the place of the tile
      index += TILES;
      if (index < count) load_tile(sh, tile = tiles.get(g, index));
    }
    __syncwarp();
    cluster_arrive();
    cluster_wait();
  }
}

// logits += u B of this warp's token, over num_ranks ranks from first_r on.
__device__ void expand(const Arguments &g, const Shared &sh, int adapter, int first_r,
                       int num_ranks, float (&logits)[WORDS]) {
  const int lane = threadIdx.x % 32, column = lane % 4 * 2;
  const unsigned *u = sh.u[threadIdx.x / 32] + lane % 4;
  const unsigned short *b = g.memory + g.b[adapter] + first_r * g.num_experts;
#pragma unroll
  for (int w = 0; w < WORDS; w++) {
#pragma unroll 1
    for (int first = 0; first < 32; first += 8) {  // 8 experts at once
      const int expert = w * 32 + first + lane / 4;
      const auto b_of = [&](int r) -> unsigned {
        return r < num_ranks && expert < g.num_experts ? b[r * g.num_experts + expert] : 0;
      };
      const float even = __shfl_sync(ALL, logits[w], first + column);
      const float odd = __shfl_sync(ALL, logits[w], first + column + 1);
      float acc[4] = {even, odd, even, odd};  // every row of the product is this token
#pragma unroll 4
      for (int k = 0; k < num_ranks; k += 16) {
        const unsigned rows[4] = {u[k / 2], u[k / 2], u[k / 2 + 4], u[k / 2 + 4]};
        const int r = k + column;
        multiply_add(acc, rows, b_of(r) | b_of(r + 1) << 16, b_of(r + 8) | b_of(r + 9) << 16);
      }
      const float new_even = __shfl_sync(ALL, acc[0], lane % 8 / 2);
      const float new_odd = __shfl_sync(ALL, acc[1], lane % 8 / 2);
      if (lane / 8 == first / 8) logits[w] = lane % 2 ? new_odd : new_even;
    }
  }
}

// logits += scale (normed A^T) B of this warp's token, if its adapter changes the router.
//
// Lane i has the adapter and the rank of token i; rank 0: none, or it leaves the router alone.
// The whole cluster multiplies with A, the first program with B.
__device__ void add_low_rank(const Arguments &g, Shared &sh, int adapter, int rank, int num_here,
                             float (&logits)[WORDS]) {
  const int warp = threadIdx.x / 32;
  const int own = __shfl_sync(ALL, adapter, warp), own_rank = __shfl_sync(ALL, rank, warp);
  const int largest = __reduce_max_sync(ALL, rank);
  for (int first_r = 0; first_r < largest; first_r += RANKS) {
    shrink(g, sh, adapter, rank, first_r, num_here);
    if (blockIdx.x == 0 && own_rank > first_r)
      expand(g, sh, own, first_r, min(own_rank - first_r, RANKS), logits);
    __syncwarp();
  }
}

// A warp chooses the experts of its token `here` of this cluster: ids, weights, mask.
__device__ void choose(const Arguments &g, Shared &sh, int here, int token,
                       float (&logits)[WORDS]) {
  const int lane = threadIdx.x % 32;
  float powers[WORDS];
  unsigned keys[WORDS], masks[WORDS] = {};  // keys: 0 is nobody's
  int chosen_as[WORDS];
#pragma unroll
  for (int w = 0; w < WORDS; w++) {
    logits[w] = fmaxf(logits[w], -3.0e38f) + 0.f;  // no NaN, and no -0, which would rise to +0
    keys[w] = w * 32 + lane < g.num_experts ? rising(logits[w]) : 0;
    chosen_as[w] = -1;
  }
#pragma unroll
  for (int k = 0; k < TOP_K; k++) {
    unsigned largest = keys[0];
#pragma unroll
    for (int w = 1; w < WORDS; w++) largest = max(largest, keys[w]);
    largest = __reduce_max_sync(ALL, largest);
    bool found = false;  // ties go to the lower expert
#pragma unroll
    for (int w = 0; w < WORDS; w++) {
      if (k == 0) {
        const float power = power_of_2((logits[w] - risen(largest)) * 1.4426950408889634f);
        powers[w] = keys[w] ? power : 0.f;
      }
      const unsigned equal = __ballot_sync(ALL, keys[w] == largest);
      if (found || !equal) continue;
      found = true;
      const int winner = __ffs(equal) - 1, place = w * 32 + winner - g.first_expert;
      if (place >= 0 && place < g.num_local) masks[w] |= 1u << winner;
      if (lane == winner) {
        chosen_as[w] = k;
        keys[w] = 0;
      }
    }
  }
  long long total = 0;  // integers: their sum has no order
#pragma unroll
  for (int w = 0; w < WORDS; w++)
    if (!RENORMALIZE || chosen_as[w] >= 0) total += (long long)(powers[w] * 0x1p40f);
  const float sum = (float)sum_of_warp(total) * 0x1p-40f;
#pragma unroll
  for (int w = 0; w < WORDS; w++) {
    if (lane == 0) sh.masks[here][w] = g.masks[token * WORDS + w] = masks[w];
    if (chosen_as[w] < 0) continue;
    const int slot = token * TOP_K + chosen_as[w];
    sh.experts[here * TOP_K + chosen_as[w]] = g.ids[slot] = w * 32 + lane;
    g.weights[slot] = divide(powers[w], sum);
  }
}

// One warp: the first row of each expert, its rows in blocks of block_m; blocks left over get -1.
__device__ void write_blocks(const Arguments &g, Shared &sh) {
  const int lane = threadIdx.x % 32;
  int rows = 0, blocks = 0;
  for (int w = 0; w < WORDS; w++) {
    const int expert = w * 32 + lane;
    int count = 0;
    for (int i = 0; i < MAX_TOKENS / 32; i++) count += __popc(sh.tokens[i][expert]);
    const int own = (count + g.block_m - 1) / g.block_m;
    const int sum = sum_up_to_lane(count | own << 16);  // both at once
    const int first = rows + (sum & 0xffff) - count, end = first + count;
    int4 *block = g.blocks + blocks + (sum >> 16) - own;
    sh.first_row[expert] = first;
    for (int row = first; row < end; row += g.block_m)
      *block++ = make_int4(expert - g.first_expert, row, min(row + g.block_m, end), 0);
    const int all = __shfl_sync(ALL, sum, 31);
    rows += all & 0xffff;
    blocks += all >> 16;
  }
  for (int i = blocks + lane; i < g.num_blocks; i += 32) g.blocks[i].x = -1;
}

// Slots in the order of their experts, from the shared masks and experts of all tokens.
__device__ void sort(const Arguments &g, Shared &sh) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = warp % (MAX_TOKENS / 32), word = warp / (MAX_TOKENS / 32);
  if (word < WORDS) {  // 32 tokens' masks of 32 experts are turned around
    const int token = group * 32 + lane;
    const unsigned mask = token < g.num_tokens ? sh.masks[token][word] : 0;
    unsigned mine = 0;
#pragma unroll
    for (int bit = 0; bit < 32; bit++) {
      const unsigned tokens = __ballot_sync(ALL, mask >> bit & 1);
      if (lane == bit) mine = tokens;
    }
    sh.tokens[group][word * 32 + lane] = mine;
  }
  __syncthreads();
  if (warp == 0) write_blocks(g, sh);
  __syncthreads();
  for (int slot = threadIdx.x; slot < g.num_tokens * TOP_K; slot += THREADS) {
    const int token = slot / TOP_K, expert = sh.experts[slot], before = token / 32;
    if (!(sh.masks[token][expert / 32] >> expert % 32 & 1)) continue;  // not held here
    int row = sh.first_row[expert];
    for (int i = 0; i < before; i++) row += __popc(sh.tokens[i][expert]);
    row += __popc(sh.tokens[before][expert] & ((1u << token % 32) - 1));
    g.slots[row] = slot;
  }
}

// at most 64 registers a thread, so that programs of the kernels beside have room on the SM
extern "C" __global__ void __launch_bounds__(THREADS, 2)
router_kernel(const __grid_constant__ Arguments g) {
  extern __shared__ __align__(128) char memory[];
  Shared &sh = *(Shared *)memory;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, clusters = gridDim.y;
  const int first_token = blockIdx.y * TOKENS, num_here = min(g.num_tokens - first_token, TOKENS);
  const int token = first_token + warp, first_column = blockIdx.x * OWN * 256;
  cluster_arrive();  // this program has started: others may store in its memory
  for (int i = threadIdx.x; i < OWN * EXPERTS * 32; i += THREADS) {
    const int part = i % 32 * 8, row = i / 32, expert = row % EXPERTS;
    const int column = first_column + row / EXPERTS * 256 + part;
    const bool exists = expert < g.num_experts && column < HIDDEN;
    copy_async(sh.weight + row * W_PITCH + part * 2,
               g.weight + (exists ? expert * HIDDEN + column : 0), exists ? 16 : 0);
  }
  uint4 x[OWN], norm[OWN];
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    const int column = first_column + i * 256 + lane * 8;
    x[i] = norm[i] = make_uint4(0, 0, 0, 0);
    if (column < HIDDEN) norm[i] = *(const uint4 *)(g.norm + column);
  }
  float bias[WORDS];
#pragma unroll
  for (int w = 0; w < WORDS; w++) {
    const int expert = w * 32 + lane;
    bias[w] = g.bias && expert < g.num_experts ? bf16(g.bias[expert]) : 0.f;
  }
  if (threadIdx.x < TOKENS * 16 && threadIdx.x % 16 >= SLICES)
    sh.squares[threadIdx.x / 16][threadIdx.x % 16] = 0.f;
  wait_for_previous_kernel();
  let_next_kernel_start();
  int adapter = -1, rank = 0;  // lane i's are those of token i of this cluster
  if (g.slot_of_token && lane < num_here) adapter = g.slot_of_token[first_token + lane];
  if (warp < num_here) {
#pragma unroll
    for (int i = 0; i < OWN; i++) x[i] = load_sum(g, token, first_column + i * 256 + lane * 8);
  }
  // the weight's copies, and that others have started, are waited for behind a row's squares
  if (g.num_tokens <= FEW) {
    for (int here = 0; here < num_here; here++) {  // a warp a slice
      const float sum = sum_of_squares(load_sum(g, here, warp * 256 + lane * 8));
      if (lane == 0) sh.squares[here][warp] = sum;
    }
    cluster_wait();
    wait_for_copies();
    __syncthreads();
  } else {
    cluster_wait();
    if (warp < num_here) {
#pragma unroll
      for (int i = 0; i < OWN; i++) {
        const float sum = sum_of_squares(x[i]);
        if (lane < PROGRAMS)
          store_in_program(lane, &sh.squares[warp][blockIdx.x * OWN + i], sum);
      }
    }
    __syncwarp();
    cluster_arrive();
    wait_for_copies();
    cluster_wait();
  }
  // Nothing waits for it before the logits are there. In a warm-up, where none of Triton's kernels
  // runs, a slot is anything.
  if (adapter >= 0 && adapter < g.num_adapters) rank = g.rank[adapter];
  if (warp < num_here) {
    const float sum = sum_of_warp(sh.squares[warp][lane % 16], 16);
    const float scale = inverse_root(fmaf(sum, 1.f / HIDDEN, g.eps));
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      const int column = first_column + i * 256 + lane * 8;
      const uint4 normed =
          make_uint4(scaled(x[i].x, scale, norm[i].x), scaled(x[i].y, scale, norm[i].y),
                     scaled(x[i].z, scale, norm[i].z), scaled(x[i].w, scale, norm[i].w));
      *(uint4 *)(sh.x + warp * X_PITCH + i * 512 + lane * 16) = normed;
      if (column >= HIDDEN) continue;
      *(uint4 *)(g.normed + token * HIDDEN + column) = normed;
      if (g.residual) *(uint4 *)(g.summed + token * HIDDEN + column) = x[i];
    }
  }
  __syncthreads();
  const int halves = num_here > 8 ? 2 : 1;
  for (int task = warp; task < OWN * (EXPERTS / 16) * halves; task += THREADS / 32) {
    const int own = task % OWN, group = task / OWN % (EXPERTS / 16);
    multiply(sh, own, group, task / OWN / (EXPERTS / 16), num_here);
  }
  __syncwarp();
  cluster_arrive();
  if (blockIdx.x && !__any_sync(ALL, rank > 0)) return;  // the whole cluster sees the same ranks
  cluster_wait();
  float logits[WORDS] = {};
  if (blockIdx.x == 0 && warp < num_here) add_slices(sh, warp, bias, logits);
  if (__any_sync(ALL, rank > 0)) {
    add_low_rank(g, sh, adapter, rank, num_here, logits);
    if (blockIdx.x) return;
  }
  if (warp < num_here) choose(g, sh, warp, token, logits);
  __syncthreads();
  if (clusters > 1) {  // the last to arrive sorts the slots of all
    if (threadIdx.x == 0) {
      sh.is_last = count_in(g.counter) == clusters - 1;
      if (sh.is_last) *g.counter = 0;
    }
    __syncthreads();
    if (!sh.is_last) return;
    // past L1
    for (int i = threadIdx.x; i < g.num_tokens * WORDS; i += THREADS)
      sh.masks[i / WORDS][i % WORDS] = __ldcg(g.masks + i);
    for (int i = threadIdx.x; i < g.num_tokens * TOP_K; i += THREADS)
      sh.experts[i] = __ldcg(g.ids + i);
    __syncthreads();
  }
  sort(g, sh);
}
