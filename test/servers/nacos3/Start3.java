import com.alibaba.nacos.NacosServerBasicApplication;
import com.alibaba.nacos.NacosServerWebApplication;
import com.alibaba.nacos.core.listener.startup.NacosStartUp;
import com.alibaba.nacos.core.listener.startup.NacosStartUpManager;
import com.alibaba.nacos.sys.env.DeploymentType;
import com.alibaba.nacos.sys.env.EnvUtil;
import org.springframework.boot.Banner;
import org.springframework.boot.WebApplicationType;
import org.springframework.boot.builder.SpringApplicationBuilder;
import org.springframework.context.ConfigurableApplicationContext;

/**
 * Starts a Nacos 3 server from its jars, which come without its starter: the core, under it the HTTP API, and with
 * -Dstart3.console=true the console with a port of its own.
 */
public final class Start3 {
    public static void main(String[] args) throws Exception {
        boolean console = Boolean.getBoolean("start3.console");
        EnvUtil.setDeploymentType(DeploymentType.getType(console ? "merged" : "server"));
        NacosStartUpManager.start(NacosStartUp.CORE_START_UP_PHASE);
        ConfigurableApplicationContext core = new SpringApplicationBuilder(NacosServerBasicApplication.class)
                .web(WebApplicationType.NONE).bannerMode(Banner.Mode.OFF).run(args);
        NacosStartUpManager.start(NacosStartUp.WEB_START_UP_PHASE);
        new SpringApplicationBuilder(NacosServerWebApplication.class).parent(core)
                .bannerMode(Banner.Mode.OFF).run(args);
        if (console) {
            NacosStartUpManager.start(NacosStartUp.CONSOLE_START_UP_PHASE);
            new SpringApplicationBuilder(Class.forName("com.alibaba.nacos.console.NacosConsole")).parent(core)
                    .bannerMode(Banner.Mode.OFF).run(args);
        }
    }
}
