// This level's kernels, gathered for src/dispatch.cpp.
#include "kernels.h"

#define HEADRACE_TEXT(x) HEADRACE_TEXT_(x)
#define HEADRACE_TEXT_(x) #x

namespace headrace::HEADRACE_LEVEL {

void pack(const PackArgs&);
void linear(const LinearArgs&);
void norm(const NormArgs&);
void embed(const EmbedArgs&);
void cap(const CapArgs&);
void rotate(const RotateArgs&);
void attention(const AttentionArgs&);
void gumbel(const GumbelArgs&);
void uniform(const GumbelArgs&);
void choose(const ChooseArgs&);
uint64_t read(const ReadArgs&);

extern const KernelTable table;
const KernelTable table = {HEADRACE_TEXT(HEADRACE_LEVEL), pack, linear, norm, embed, cap, rotate, attention, gumbel,
                           uniform, choose, read};

}  // namespace headrace::HEADRACE_LEVEL
