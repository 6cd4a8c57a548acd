// More photographs, where a server is behind the page.

async function add(blob, name) {
  element("status").textContent = `${name} ...`;
  try {
    const reply = await fetch("photos", { method: "POST", headers: { "X-Name": encodeURIComponent(name) }, body: blob });
    const said = await reply.json();
    if (!reply.ok) throw new Error(said.error);
    photos.push(said);
    element("status").textContent = "";
    start(photos.length - 1);
  } catch (error) {
    element("status").textContent = `${name}: ${error.message}`;
  }
}

async function toggleWebcam() {
  const video = element("video"), isOn = video.srcObject !== null;
  if (isOn) {
    video.srcObject.getTracks().forEach((track) => track.stop());
    video.srcObject = null;
  } else {
    try {
      video.srcObject = await navigator.mediaDevices.getUserMedia({ video: true });
      await video.play();
    } catch (error) {
      element("status").textContent = `no webcam: ${error.message}`;
      return;
    }
  }
  video.hidden = element("frame").hidden = isOn;
}

async function takeFrame() {
  const video = element("video"), canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
  canvas.getContext("2d").drawImage(video, 0, 0);
  await add(await canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 }), `frame ${photos.length + 1}`);
}

element("files").addEventListener("change", async (event) => {
  for (const file of event.target.files) await add(file, file.name);
  event.target.value = "";
});
element("webcam").addEventListener("click", toggleWebcam);
element("frame").addEventListener("click", takeFrame);
