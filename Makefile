# Everything sets up .venv first, and only when something it is made from has changed.
.PHONY: setup demo clip serve witness witness-engine witness-calibrated test test-fast fuzz options soak accuracy accuracy-short gpu-report lint
export HF_HUB_OFFLINE ?= 1
VENV := .venv/bin

setup:
	@scripts/setup.sh

# make demo [VIDEO=file.mp4] [QUESTION="..." or QUESTIONS=file.jsonl] [MODEL=folder] [OUT=folder]
demo: setup
	@$(VENV)/metok demo $(if $(VIDEO),--video "$(VIDEO)") $(if $(QUESTION),--question "$(QUESTION)") \
		$(if $(QUESTIONS),--questions "$(QUESTIONS)") $(if $(MODEL),--model "$(MODEL)") $(if $(OUT),--out "$(OUT)")

# make clip [N=0 to 999]: one more video of the demo model's world, with questions and their answers
N ?= 1
clip: setup
	@$(VENV)/python -m training.make_set --split demo --first "$(N)" --videos 1 --questions 12 --scale 4 --out out/clip
	@echo 'Now: make demo QUESTIONS=out/clip/questions.jsonl'

# make serve MODEL=folder [DOMAINS="host ..."] [ARGS="..."]: vLLM's server with METok, on this machine's CPU.
# Without a list vLLM fetches media from every host; none.invalid is a name that no host can have (RFC 2606)
serve: setup
	@[ -n "$(MODEL)" ] || { echo 'make serve: state the checkpoint: make serve MODEL=folder' >&2; exit 2; }
	@TRITON_INTERPRET=1 VLLM_MEDIA_URL_ALLOW_REDIRECTS=0 VLLM_CPU_KVCACHE_SPACE=$${VLLM_CPU_KVCACHE_SPACE:-4} $(VENV)/vllm serve "$(MODEL)" --plugin metok \
		--host 127.0.0.1 --allowed-media-domains $(or $(DOMAINS),none.invalid) $(ARGS)

test: setup
	@scripts/test.sh

# make test-fast: what needs no engine, no server and no interpreted kernel; under two minutes
test-fast: setup
	@OMP_NUM_THREADS=1 $(VENV)/python -m pytest -q tests/unit --ignore tests/unit/media --ignore tests/unit/kernels --ignore tests/unit/oracle

# make fuzz [MINUTES=5] [SEED=0] [CASE="mp4: ..."]: the long form of tests/unit/media/test_fuzz.py; or one case alone
fuzz: setup
	@OMP_NUM_THREADS=1 $(VENV)/python -m tests.support.media_fuzz $(if $(MINUTES),--minutes "$(MINUTES)") \
		$(if $(SEED),--seed "$(SEED)") $(if $(CASE),--case "$(CASE)")

# make options: docs/options.md from the settings' own descriptions
options: setup
	@$(VENV)/python scripts/options.py

# make soak [REQUESTS=3000]: the long form of tests/server/test_soak.py
soak: setup
	@METOK_SOAK_REQUESTS=$(or $(REQUESTS),3000) OMP_NUM_THREADS=1 $(VENV)/python -m pytest -q -s --timeout 0 tests/server/test_soak.py

# make accuracy [MODEL=folder] [ARGS="..."]: what compression costs in answers, on CPU; accuracy-short: a reduced run
accuracy accuracy-short: setup
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VENV)/python -m benchmarks.accuracy $(if $(filter %-short,$@),--short) \
		$(if $(MODEL),--model "$(MODEL)") $(ARGS)

# make witness [ARGS="..."]: METok on a real language model that reads captions; fetches the model, goes on if it was stopped
# make witness-engine [ARGS="..."]: the same model inside vLLM, each answer against the oracle
# make witness-calibrated [ARGS="..."]: metok calibrate on it, and the right answers under what was found
witness witness-engine witness-calibrated: setup
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VENV)/python -m benchmarks.$(subst -,.,$@) $(ARGS)

# make gpu-report [MODEL=folder] [STAGES="..."]: all that a GPU can say of METok, in one report, out/gpu-report/report.md.
# Runs with PYTHON (python3), which has vLLM for the GPU: pip install -e '.[gpu,dev]'. SMALL=1: the smallest form, on a CPU
gpu-report: $(if $(SMALL),setup)
	@$(if $(SMALL),$(VENV)/python,$(or $(PYTHON),python3)) -m benchmarks.gpu $(if $(SMALL),--small) \
		$(if $(MODEL),--model "$(MODEL)") $(STAGES) $(ARGS)

lint: setup
	@$(VENV)/ruff check . && $(VENV)/ruff format --check . && $(VENV)/mypy
