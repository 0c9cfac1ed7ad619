# Everything sets up .venv first, and only when something it is made from has changed.
.PHONY: setup demo serve test test-fast lint format
export HF_HUB_OFFLINE ?= 1
VENV := .venv/bin

setup:
	@scripts/setup.sh

# make demo [VIDEO=file.mp4] [QUESTION="..."] [MODEL=folder] [OUT=folder]
demo: setup
	@$(VENV)/metok demo $(if $(VIDEO),--video "$(VIDEO)") $(if $(QUESTION),--question "$(QUESTION)") \
		$(if $(MODEL),--model "$(MODEL)") $(if $(OUT),--out "$(OUT)")

# make serve MODEL=folder [ARGS="..."]: vLLM's server with METok, on this machine's CPU
serve: setup
	@TRITON_INTERPRET=1 VLLM_CPU_KVCACHE_SPACE=$${VLLM_CPU_KVCACHE_SPACE:-4} $(VENV)/vllm serve "$(MODEL)" --plugin metok \
		--host 127.0.0.1 --allowed-media-domains localhost $(ARGS)

test: setup
	@scripts/test.sh

lint: setup
	@$(VENV)/ruff check . && $(VENV)/ruff format --check . && $(VENV)/mypy
